"""From a file, a folder or a hub id to modules filled with weights."""
