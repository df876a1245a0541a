"""Put what `tools.train_control` has trained beside the demo's base, in the layout of real files.

python -m tools.export_control --work .ckpt-control --out wan_core/demo_model

VACE modules become files like those published without their base, Fun Control's transformers
folders with a config.json. What WORK does not hold is left as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

VACE_NAME = "wan_demo_vace_module_{level}_noise.safetensors"
FOLDERS = {"high": "transformer", "low": "transformer_2"}
"""Expert -> its folder in a diffusers model."""


def export(work: Path, out: Path) -> list[Path]:
    """Copy what was trained; return the files written."""
    written = []
    for level, folder in FOLDERS.items():
        for sort in ("vace", "fun"):
            trained = work / f"{sort}_{level}.safetensors"
            if not trained.is_file():
                continue
            if sort == "vace":
                target = out / "vace" / VACE_NAME.format(level=level)
            else:
                target = out / "fun" / folder / "diffusion_pytorch_model.safetensors"
                config = json.loads((out / "t2v" / folder / "config.json").read_text())
                target.parent.mkdir(parents=True, exist_ok=True)
                whole = json.dumps({**config, "in_channels": 52}, indent=2)
                (target.parent / "config.json").write_text(whole + "\n")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(trained, target)  # without the trained file's mode
            written.append(target)
    return written


def main() -> None:
    """Export, then print each file's size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for path in export(args.work, args.out):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
