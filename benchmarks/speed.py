"""How fast is a forward, a decode, a clip? Each way beside diffusers, in one run on one GPU.

    python benchmarks/speed.py [--budget 530] [--output FOLDER] [--folder FOLDER]
    python benchmarks/speed.py --part forward [--only forward-...]
    python benchmarks/speed.py --part decode
    python benchmarks/speed.py --part clip

The first takes less than nine minutes on an H200 and holds what says most of each part; a part by
itself takes as long and holds more. Everything has its true shape, and random weights:

- forward (``forwards.py``): one forward (a guided step has two) of the 14B at 480p81 and 720p81, in
  bf16 and stored in fp8, of the 5B at 704p121 with a held first frame, and of the 1.3B at 480p81;
- decode (``autoencoders.py``): decodes, and by itself encodes, of both VAEs;
- clip (``clip.py``): four steps of A14B at 480p81, from the files to the mp4, beside diffusers'
  pipeline.

Errors are relative, in the Euclidean norm, against diffusers' forward of the same weights, or its
VAE in fp32. Ways take turns; every second turn runs in reverse. A ratio is the median of the turns'
ratios to diffusers eager. What a part holds runs in the order of its worth within ``--budget``
seconds, and results are written after each row: ``results/speed_<device>.json`` and ``.md``, of a
part ``speed_<device>_<part>``. With ``--tiny`` everything is gone through with small models on the
CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from wan_core.memory import close_gaps

if __name__ == "__main__":
    close_gaps()  # before torch is imported

import autoencoders
import clip
import forwards
import torch
from speed_bench import Bench

from wan_core.journal import versions

ORDER = {
    "all": ("forward-14b-480p", "forward-14b-720p", "clip-diffusers", "forward-5b-704p",
            "forward-1.3b-480p", "decode-2.1", "decode-2.2", "clip-fp8"),
    "forward": ("forward-14b-480p", "forward-14b-720p", "forward-5b-704p", "forward-1.3b-480p"),
    "decode": ("decode-2.1", "decode-2.2", "encode-2.1", "encode-2.2"),
    "clip": ("clip-bf16", "clip-fp8"),
}  # fmt: skip
"""What each part holds, in the order of its worth. Diffusers' clip is made by the 14B before it."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--part", default="all", choices=list(ORDER))
    parser.add_argument("--budget", type=float, default=530, help="seconds")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="*", help="of the part, these; see ORDER")
    parser.add_argument("--folder", type=Path, help="where a clip's files are written")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    names = ORDER[given.part] if given.only is None else tuple(given.only)
    if unknown := set(names) - set(ORDER[given.part]):
        parser.error(f"{', '.join(sorted(unknown))}: the part has {', '.join(ORDER[given.part])}")
    cuda = torch.cuda.is_available() and not given.tiny
    if not cuda and not given.tiny:
        parser.error("there is no CUDA device; --tiny goes through everything on the CPU")
    device = torch.device("cuda" if cuda else "cpu")
    bench = Bench(device, given.output, given.budget, given.tiny, brief=given.part == "all")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    short = re.search(r"[A-Z]{1,3}\d{2,4}", name)
    bench.found = {
        "device": name,
        "short": short.group().lower() if short else name.lower().replace(" ", "_"),
        "versions": versions(), "part": given.part, "forwards": [], "decodes": [], "clips": [],
        "notes": [],
    }  # fmt: skip
    work = forwards.parts(bench) | autoencoders.parts(bench) | clip.parts(bench, given.folder)
    for name in names:
        bench.part(name, *work[name])
        if bench.brief:
            bench.found["took"] = time.perf_counter() - bench.begun
            bench.save()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
