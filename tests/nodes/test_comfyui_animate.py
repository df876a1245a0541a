"""A character in a running ComfyUI: replaced in a video, segment by segment, to an mp4.

Small weights of the true class; pictures from ComfyUI's own nodes. Killed in the second segment
and queued again, the render goes on and gives the frames of an undisturbed one. Both example
workflows run as they are shipped, with small files of the names and layouts that they ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from support import animate_files, tiny_models
from support.comfy_browser import api_prompt, find_browser, open_page
from support.comfy_graphs import (
    as_api,
    frames_of,
    graph,
    read_video,
    saved_video,
    with_values,
    workflow,
)
from support.comfy_server import ComfyServer, find_checkouts

CHECKOUTS = find_checkouts()
BROWSER = find_browser()
WIDTH, HEIGHT, FRAMES, STEPS = 64, 48, 22, 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.comfyui,
    pytest.mark.skipif(not CHECKOUTS, reason="no ComfyUI checkout (set COMFYUI_PATH)"),
]


@pytest.fixture(scope="module")
def server(comfyui: ComfyServer) -> Iterator[ComfyServer]:
    # Deep enough that a segment lasts longer than it takes to kill the server.
    deep = {"num_layers": 40, "inject_face_latents_blocks": 20, "ffn_dim": 2048}
    tiny_models.make_folder(
        comfyui.base / "models" / "diffusers" / "tiny-animate", tiny_models.ANIMATE,
        transformer=deep,
    )  # fmt: skip
    animate_files.write(comfyui.base / "models")
    write_inputs(comfyui.base / "input")
    with comfyui:
        yield comfyui


def write_inputs(folder: Path) -> None:
    """What the example workflows name: a picture, and silent videos of 25 frames a second."""
    Image.new("RGB", (40, 56), (200, 120, 60)).save(folder / "character.png")
    for number, name in enumerate(("driving", "source", "pose", "face", "mask")):
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for frame in range(FRAMES):
                pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
                pixels[8:40, 2 * frame : 2 * frame + 20] = 255 if name == "mask" else 90 + number
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))


def picture(frames: int, width: int, height: int, colour: int) -> dict[str, Any]:
    inputs = {"width": width, "height": height, "batch_size": frames, "color": colour}
    return {"class_type": "EmptyImage", "inputs": inputs}


def controlled(model: str, given: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Loader, WanControl with what is given of the pictures, WanChunkedSampler, SaveVideo."""
    prompt = graph(
        "WanChunkedSampler", model, control=["30", 0], width=WIDTH, height=HEIGHT, num_frames=0,
        steps=STEPS, window_frames=13, window_overlap=1, **more,
    )  # fmt: skip
    size = tiny_models.FACE_SIZE
    prompt |= {
        "31": picture(FRAMES, WIDTH, HEIGHT, 0x204060), "32": picture(1, 40, 40, 0xC08040),
        "33": picture(FRAMES, size, size, 0x907060), "34": picture(FRAMES, WIDTH, HEIGHT, 0x30A050),
        "35": {
            "class_type": "SolidMask", "inputs": {"value": 1.0, "width": WIDTH, "height": HEIGHT},
        },
    }  # fmt: skip
    prompt["30"] = {"class_type": "WanControl", "inputs": given}
    prompt["21"] = {"class_type": "WanFitProbeText", "inputs": {"value": ["3", 3]}}
    return prompt


def replaced(**more: Any) -> dict[str, Any]:
    """Animate with all that it reads."""
    given = {
        "video": ["31", 0], "reference": ["32", 0], "face_video": ["33", 0],
        "background_video": ["34", 0], "mask": ["35", 0],
    }  # fmt: skip
    return controlled("tiny-animate", given, name="replaced", **more)


def driven(**more: Any) -> dict[str, Any]:
    """Animate 2, its file in rotated int8, following a video."""
    given = {"video": ["31", 0], "reference": ["32", 0]}
    return controlled(animate_files.DEEP_2, given, name="driven", guidance_scale=1.0, **more)


@pytest.mark.parametrize("prompt", [replaced, driven])
def test_a_clip_goes_on_after_the_server_was_killed_in_the_second_segment(
    server: ComfyServer, prompt: Callable[..., dict[str, Any]]
) -> None:
    def steps() -> int:
        return int(server.state()["progress"].get("3", [0, 0])[0])

    server.queue(prompt())
    server.wait_until(lambda: 0 < steps() <= STEPS, 240)  # no more those of an earlier prompt
    # Far into the segment: steps of milliseconds are not all worth saving.
    server.wait_until(lambda: steps() > STEPS + STEPS // 2, 240)
    server.kill()
    server.start()
    server.await_start()
    outputs = server.run(prompt())
    assert "\nresumed: segment 2 of 2" in outputs["21"]["value"][0]
    frames, _, rate = read_video(saved_video(server, outputs, "5"))
    assert len(frames) == FRAMES and frames[0].shape == (HEIGHT, WIDTH, 3)
    assert rate == (30.0 if prompt is replaced else 24.0)  # the model's own
    name = prompt.__name__
    after = frames_of(server, name)
    server.run(prompt(resume="never"))
    assert torch.equal(frames_of(server, name), after)
    assert after.std() > 0.01  # not one flat colour


MISTAKES: tuple[tuple[Callable[..., dict[str, Any]], dict[str, Any], str], ...] = (
    (replaced, {"reference": None}, "reference of WanControl is missing: Wan 2.2 Animate 14B"),
    (replaced, {"face_video": None}, "face_video of WanControl is missing"),
    (replaced, {"reference": ["36", 0]}, "reference of WanControl holds 2 pictures"),
    (replaced, {"mask": ["37", 0]}, "mask of WanControl has 5 frames and back"),
    (replaced, {"background_video": None}, "mask of WanControl was given without back"),
    (driven, {"reference": None}, "reference of WanControl is missing: Wan Animate 2 14B"),
    (driven, {"reference": ["36", 0]}, "reference of WanControl holds 2 pictures"),
    (
        driven,
        {"face_video": ["33", 0]},
        "face_video of WanControl was given, but Wan Animate 2 14B",
    ),
    (driven, {"mask": ["35", 0]}, "mask of WanControl was given, but Wan Animate 2 14B"),
)


@pytest.mark.parametrize(("prompt", "change", "said"), MISTAKES)
def test_a_mistake_is_told_by_its_socket_before_any_weight_is_read(
    server: ComfyServer, prompt: Callable[..., dict[str, Any]], change: dict[str, Any], said: str
) -> None:
    server.free()
    wrong = prompt()
    given = wrong["30"]["inputs"] | change
    wrong["30"]["inputs"] = {name: link for name, link in given.items() if link is not None}
    wrong |= {"36": picture(2, 40, 40, 0xC08040), "38": picture(5, WIDTH, HEIGHT, 0xFFFFFF)}
    wrong["37"] = {"class_type": "ImageToMask", "inputs": {"image": ["38", 0], "channel": "red"}}
    entry = server.wait(server.queue(wrong))
    assert entry["status"]["status_str"] == "error"
    messages = dict(entry["status"]["messages"])
    assert said in messages["execution_error"]["exception_message"]
    assert server.state()["weight_bytes"] == 0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("animate_character", ("model: Wan Animate 2 14B", "lcm", "int8")),
        ("animate_replace_character", ("model: Wan 2.2 Animate 14B", "fp8 scaled per tensor")),
    ],
)
def test_an_example_workflow_runs_to_an_mp4(
    server: ComfyServer, name: str, told: tuple[str, ...]
) -> None:
    small = {"width": WIDTH, "height": HEIGHT, "steps": 2, "window_frames": 13}
    prompt = as_api(with_values(workflow(name), **small))
    sampler = next(key for key, one in prompt.items() if one["class_type"] == "WanChunkedSampler")
    node = next(key for key, one in prompt.items() if one["class_type"] == "SaveVideo")
    prompt["90"] = {"class_type": "WanFitProbeText", "inputs": {"value": [sampler, 3]}}
    outputs = server.run(prompt)
    report = outputs["90"]["value"][0]
    assert all(words in report for words in ("2 segments of 13", *told)), report
    frames, _, rate = read_video(saved_video(server, outputs, node))
    assert len(frames) == FRAMES and frames[0].shape == (HEIGHT, WIDTH, 3)
    assert rate == 25.0  # the driving video's
    assert np.stack(frames).std() > 1  # not one flat colour


@pytest.mark.skipif(isinstance(BROWSER, str), reason=str(BROWSER))
def test_the_example_workflows_open_in_the_browser_as_they_are_stored(server: ComfyServer) -> None:
    assert isinstance(BROWSER, Path)
    with open_page(server.url, BROWSER) as page:
        for name in ("animate_character", "animate_replace_character"):
            saved = workflow(name)
            sent, stored = api_prompt(page, saved), as_api(saved)
            assert sent.keys() == stored.keys()
            for key, node in stored.items():
                node["inputs"].pop("upload", None)  # a button
                assert node["class_type"] == sent[key]["class_type"]
                assert node["inputs"].items() <= sent[key]["inputs"].items()
        assert page.wanfit_errors == []
