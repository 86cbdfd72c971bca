"""Reads files that are made to hurt in a process of its own, and measures what each takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap

READ = """
    import json, resource, sys, time
    import numpy, av
    import PIL.Image, PIL.PngImagePlugin, PIL.JpegImagePlugin, PIL.WebPImagePlugin, PIL.TiffImagePlugin
    from fastvid.media.clip import open_clip
    from fastvid.errors import Error

    def peak():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

    for path in json.loads(sys.argv[1]):
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        before, start, says = peak(), time.process_time(), None
        try:
            clip = open_clip(path)
            clip.tail(1)
        except Error as error:
            says = f"{type(error).__name__}: {error}"
        print(json.dumps([path, says, time.process_time() - start, (peak() - before) >> 10]), flush=True)
"""


def check_refused(says: dict[str, str], seconds: float = 2, mebibytes: int = 256) -> None:
    """Each of these paths is refused with these words, within this CPU time and memory; "" stands for read or
    refused."""
    words = [sys.executable, "-c", textwrap.dedent(READ), json.dumps(list(says))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(says)
    wrong = {}
    for name, (said, taken, grown) in found.items():
        refused = said is not None and re.search(says[name], said) and name.split("/")[-1] in said
        if not (refused or says[name] == "") or taken > seconds or grown > mebibytes:
            wrong[name] = (said, taken, grown)
    assert not wrong
