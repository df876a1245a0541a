"""Generates in a process of its own and prints, as JSON, the anonymous memory of each stage.

``python -m support.ram_peaks JOB``, JSON: ``files`` by the names of ``WanModelFiles``, those that
are not given being the small ones of ``single_files`` below ``folder``; ``loras``, ``optimization``
and ``config`` as the product takes them. Files of ``map_from`` bytes or more stay mapped. Anonymous
memory is what the system cannot take back: pages of a mapped file are not in it.
"""

from __future__ import annotations

import json
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JOB = {"prompt": "a red cat", "width": 32, "height": 32, "num_frames": 5, "seed": 1,
       "num_inference_steps": 1, "guidance_scale": 1.0}  # fmt: skip
_EVERY = 0.002


def anonymous() -> int:
    """Bytes of this process that are neither a file's pages nor shared."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
    raise OSError("this system does not tell anonymous memory")


class Peaks:
    """The most anonymous memory of each stage, looked at five hundred times a second."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        self._stages = [""]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def look(self) -> None:
        """Count what is in use now to the stage that runs now."""
        stage, now = self._stages[-1], anonymous()
        self.of[stage] = max(self.of.get(stage, 0), now)

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self.look()

    @contextmanager
    def stage(self, name: str) -> Any:
        """Count to ``name`` inside the ``with`` block."""
        self._stages.append(name)
        try:
            yield
        finally:
            self.look()
            self._stages.pop()


def main(
    folder: str, files: dict[str, str], map_from: int, loras: list[str],
    optimization: dict[str, Any], config: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Generate twice; return the plan's figures and the measured ones, in bytes."""
    from wan_core import GenerationConfig, WanLoRA, WanModelFiles, WanPipelineLoader
    from wan_core.models import sizes
    from wan_core.render.report import Timeline

    from . import single_files

    sizes.MAP_FROM = map_from  # type: ignore[misc]
    small = {
        "text_encoder": Path(folder, "text_encoders", single_files.TEXT),
        "vae": Path(folder, "vae", single_files.VAE),
    }
    given = {name: Path(path) for name, path in files.items()}
    wrapper = WanPipelineLoader().load_wan_pipeline(
        WanModelFiles(**(small | given)), loras=[WanLoRA(Path(path)) for path in loras],
        optimization_config={"device": "cpu"} | optimization,
    )  # fmt: skip
    job = GenerationConfig(**(JOB | config))
    estimate = wrapper.plan(job)[1].estimate
    after, usual = [], Timeline.stage
    with Peaks() as peaks:

        @contextmanager
        def watched(self: Any, name: str) -> Any:
            with peaks.stage(name), usual(self, name) as report:
                yield report

        Timeline.stage = watched  # type: ignore[method-assign]
        for _ in range(2):
            result = wrapper.generate(job).raise_for_error()
            del result.frames
            after.append(anonymous())
    return {
        "host": int(estimate.host_ram_mb * 2**20),
        "planned": {stage.name: stage.host_bytes for stage in estimate.stages},
        "measured": peaks.of,
        "after": after,
        "notes": [f"{stage.name} {stage.seconds:.1f}s {stage.note}" for stage in result.stages],
    }


if __name__ == "__main__":
    told = main(**json.loads(sys.argv[1]))
    sys.stdout.write("\n" + json.dumps(told) + "\n")
