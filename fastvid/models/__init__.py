"""Model families, one folder each; the registry is the only table of them."""
