"""The live plan without ComfyUI: what is wired comes in, a plan or a clear error goes out."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import machines, published, wan_layouts
from support.as_pack import part

WORDS = Path(__file__).parents[2] / "web" / "words"

HIGH = "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
LOW = "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"
TEXT, TEXT_8 = "umt5_xxl_fp16.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAE = "wan_2.1_vae.safetensors"
JSON = {"Content-Type": "application/json", "Host": "127.0.0.1:8188"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published files of an A14B, with holes for weights."""
    root = tmp_path_factory.mktemp("models")
    large, small = (wan_layouts.FILES[name][0] for name in ("t2v-14b", "t2v-1.3b"))
    files = {
        f"diffusion_models/{HIGH}": published.comfy_scaled(large),
        f"diffusion_models/{LOW}": published.comfy_scaled(large),
        "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors": published.comfy_fp16(small),
        f"text_encoders/{TEXT}": published.comfy_umt5_fp16(),
        f"text_encoders/{TEXT_8}": published.comfy_umt5_scaled(),
        f"vae/{VAE}": wan_layouts.stored(wan_layouts.vae_21(), "bf16"),
    }
    for name, file in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        wan_layouts.write_sparse(root / name, file)
    return root


class Asker:
    """A live plan on a made-up machine."""

    def __init__(self, pack: ModuleType, root: Path) -> None:
        self.machine: Any = machines.gpu(24, ram=64)
        self.busy, self.now = False, 0.0
        files = part(pack, "nodes.files")
        listed = {
            component: {path.name: path for path in sorted((root / folder).iterdir())}
            for component, folder in (
                ("transformer", "diffusion_models"), ("transformer_2", "diffusion_models"),
                ("text_encoder", "text_encoders"), ("vae", "vae"),
            )
        } | {"image_encoder": {}}  # fmt: skip
        places = {name: str(root / name) for name in listed}
        self.folders = files.Folders((root / "diffusers",), listed, places, lambda name: None)
        live = part(pack, "nodes.live")
        host = live.Host(lambda: self.folders, lambda _: self.machine, lambda: self.busy)
        self.live = live.Live(host, lambda: self.now)

    def ask(self, nodes: Any, node: str = "3", **more: Any) -> dict[str, Any]:
        self.now += 10
        status, answer = self.live.answer(
            json.dumps({"node": node, "nodes": nodes, **more}).encode()
        )
        assert status == 200, answer
        json.dumps(answer, allow_nan=False)
        return dict(answer)


@pytest.fixture
def asker(pack: ModuleType, models: Path) -> Asker:
    return Asker(pack, models)


def graph(sampler: str = "WanGenerate", loader: Any = None, **inputs: Any) -> dict[str, Any]:
    files = {"model": HIGH, "low_noise_model": LOW, "text_encoder": TEXT, "vae": VAE}
    return {
        "1": {"class_type": "WanLoader", "inputs": files | (loader or {})},
        "3": {"class_type": sampler, "inputs": {"pipeline": ["1", 0], **inputs}},
    }


# -- a plan -------------------------------------------------------------------------------------
def test_a_plan_is_what_the_run_would_be(pack: ModuleType, asker: Asker) -> None:
    size = {"width": 1280, "height": 720, "num_frames": 81}
    loaded = part(pack, "wan_core.loading").component_cache().loaded
    before = loaded()
    found = asker.ask(graph(**size))
    assert found["ok"] and found["fits"] is True
    job = asker.live.open(part(pack, "nodes.wired").read_wired(body(graph(**size))))
    config = part(pack, "wan_core.config").GenerationConfig(prompt="", **size)
    forecast = job.wrapper.foresee(config, asker.machine)
    assert found["peak_gib"] == pytest.approx(forecast.estimate.peak_usage_mb / 1024, abs=1e-3)
    assert found["seconds"] == round(forecast.plan.seconds, 1)
    assert found["seconds_cold"] > found["seconds"] > 40 * found["step_seconds"]
    assert [stage["name"] for stage in found["stages"]] == [
        s.name for s in forecast.estimate.stages
    ]
    usable = forecast.estimate.available_mb / 1024
    assert found["usable_gib"] == pytest.approx(usable, abs=1e-3) and 12 < usable <= 24
    assert found["device"] == "GPU 24"
    assert found["headline"].startswith("Fits: ") and told_by_the_page(found) == found["headline"]
    # Nothing was loaded, and no lease would keep weights.
    assert loaded() == before


def told_by_the_page(answer: dict[str, Any]) -> str:
    """Fill in the English texts of the page as its script does for the headline."""
    words = json.loads((WORDS / "en.json").read_text("utf-8"))
    sizes = {"all": "peak_gib", "usable": "usable_gib", "ram": "ram_gib", "most": "ram_usable_gib"}
    gib = {name: f"{answer[field]:.1f}" for name, field in sizes.items()}
    text: str = words[f"verdict.{answer['verdict']}"].format(**gib, device=answer["device"])
    if answer["seconds"] is None or answer["verdict"] != "fits":
        return text

    def time(name: str) -> str:
        minutes = round(answer[name] / 60)
        assert answer[name] >= 100
        key = "time.minutes" if minutes < 60 else "time.hours"
        return str(words[key].format(h=minutes // 60, m=minutes % 60 if minutes > 59 else minutes))

    text += words["plan.takes"].format(time=time("seconds"))
    later = answer["seconds_cold"] > 1.1 * answer["seconds"]
    return text + (words["plan.first time"].format(time=time("seconds_cold")) if later else "")


def test_what_the_user_prefers_counts_below_what_the_nodes_say(
    asker: Asker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "preferences.json"
    monkeypatch.setenv("WANFIT_PREFERENCES", str(file))
    size = {"width": 832, "height": 480, "num_frames": 81}
    free = asker.ask(graph(**size))
    file.write_text('{"vram_limit_gb": 14, "speed": "fast"}')
    found = asker.ask(graph(**size))  # no new start of ComfyUI, and no other wiring
    assert 13 < found["usable_gib"] <= 14 < free["usable_gib"]
    assert any("vram_limit_gb 14" in text for text in found["reasons"])
    nodes = graph(**size)
    nodes["2"] = {
        "class_type": "WanOptimize",
        "inputs": {"pipeline": ["1", 0], "vram_limit_gb": 18.0, "speed": "exact"},
    }
    nodes["3"]["inputs"]["pipeline"] = ["2", 0]
    found = asker.ask(nodes)
    assert 14 < found["usable_gib"] <= 18 < free["usable_gib"]
    assert not any("preferences" in text for text in found["reasons"])
    file.write_text("{")
    found = asker.ask(graph(**size))
    assert found["usable_gib"] == free["usable_gib"]
    assert any("Preferences not used" in text for text in found["warnings"])


def test_the_disk_is_asked_once_a_second(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question to the disk waits for the interpreter, which a render holds."""
    asked = graph(width=832)
    asker.ask(asked)
    with monkeypatch.context() as patch:
        for name in ("stat", "lstat", "scandir"):
            patch.setattr(f"os.{name}", lambda *_, **__: pytest.fail("the disk was asked"))
        for width in (640, 832):
            request = {"node": "3", "nodes": graph(width=width)}
            assert asker.live.answer(json.dumps(request).encode())[1]["size"][0] == width
    looks = []
    monkeypatch.setattr(
        "wanfit_as_a_pack.nodes.live.fingerprint", lambda source: looks.append(source) or "other"
    )
    asker.ask(asked)  # ten seconds later
    assert len(looks) == 1


def test_a_clip_as_long_as_its_video_is_shown_with_the_usual_length(asker: Asker) -> None:
    """How long the video is, is known when it has run; that it is not counted is said."""
    nodes = graph(num_frames=0, control=["9", 0])
    nodes["9"] = {"class_type": "WanControl", "inputs": {}}
    found = asker.ask(nodes)
    assert found["ok"] and found["resolved"][0].startswith("832x480, 81 frames")
    assert "num_frames is 0" in found["warnings"][0] and "81 frames" in found["warnings"][0]
    assert any("'control' is known when it has run" in text for text in found["warnings"])
    nodes["3"]["inputs"]["num_frames"] = 49
    assert not any("num_frames is 0" in text for text in asker.ask(nodes)["warnings"])


def test_what_is_official_is_told_and_what_is_set_too(asker: Asker) -> None:
    lines = asker.ask(graph(num_frames=80))["resolved"]
    assert lines[0] == "832x480, 80 frames (made as 81), 5.00 s at 16 fps"
    assert "steps official: 40" in lines and "guidance official: 4 / 3" in lines
    assert "flow shift official: 12" in lines
    found = asker.ask(graph(steps=4, guidance_scale=1.0, guidance_scale_2=1.0, flow_shift=5.0))
    assert "steps set: 4" in found["resolved"] and "guidance set: 1 / 1" in found["resolved"]
    assert found["official"]["boundary"] == 0.875 and found["unused"] == {}
    small = {"model": "wan2.1_t2v_1.3B_fp16.safetensors", "low_noise_model": "auto"}
    found = asker.ask(graph(loader=small))
    assert "guidance official: 6" in found["resolved"]
    assert found["official"]["guidance_scale_2"] is None
    assert set(found["unused"]) == {"guidance_scale_2", "boundary", "switch_step"}


def test_the_switch_of_experts_is_that_of_the_schedule(asker: Asker) -> None:
    told = asker.ask(graph(steps=4, flow_shift=5.0))
    assert "switch of experts after step 2 of 4" in told["resolved"]  # 999 937 833 625
    told = asker.ask(graph(steps=10, switch_step=7))
    assert "switch of experts after step 7 of 10" in told["resolved"]


def test_the_optimizer_that_is_wired_counts(asker: Asker) -> None:
    nodes = graph(num_frames=81, width=1280, height=720)
    free = asker.ask(nodes)
    limited = {"pipeline": ["1", 0], "vram_limit_gb": 6.0}
    nodes["2"] = {"class_type": "WanOptimize", "inputs": limited}
    nodes["3"]["inputs"]["pipeline"] = ["2", 0]
    tight = asker.ask(nodes)
    assert tight["peak_gib"] <= 6.0 < free["peak_gib"]
    assert asker.ask(nodes, "2")["size"][:2] == [1280, 720]  # the model's own size


def test_an_estimate_of_another_clip_than_the_sampler_makes_is_warned_of_first(
    asker: Asker,
) -> None:
    nodes = graph(num_frames=121)
    size = {"width": 832, "height": 480, "num_frames": 81}
    nodes["2"] = {"class_type": "WanEstimateMemory", "inputs": {"pipeline": ["1", 0], **size}}
    first = asker.ask(nodes, "2", beside="3")["warnings"][0]
    assert "node 3" in first and "121 frames of 832x480" in first
    nodes["3"]["inputs"]["num_frames"] = 81
    assert not any("node 3" in text for text in asker.ask(nodes, "2", beside="3")["warnings"])


def test_a_node_finds_the_sampler_that_follows_it(pack: ModuleType) -> None:
    after = part(pack, "nodes.wired").sampler_after
    nodes = graph(num_frames=41)
    nodes["2"] = {"class_type": "WanOptimize", "inputs": {"pipeline": ["1", 0]}}
    assert after(nodes, "2") is None  # it is not on the sampler's way
    nodes["3"]["inputs"]["pipeline"] = ["2", 0]
    found = after(nodes, "2")
    assert (found.id, found.values["num_frames"], found.values["width"]) == ("3", 41, 832)
    nodes["3"]["inputs"]["steps"] = "many"
    assert after(nodes, "2") is None  # the sampler says so itself
    nodes["2"]["inputs"]["pipeline"] = ["3", 0]
    assert after(nodes, "9") is None  # a circle ends


def test_an_overlap_left_to_the_plan_fills_the_cards_and_a_number_stays(
    pack: ModuleType, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """321 frames are 5 windows, 10 passes: on four cards three turns, in which 6 windows fit."""
    memory, gib = part(pack, "wan_core.memory"), 2**30
    card = machines.gpu(80, ram=1024)
    cards = tuple(memory.Card(f"cuda:{i}", card.device_name, 80 * gib, 79 * gib) for i in range(4))
    monkeypatch.setattr(part(pack, "wan_core.render.pipeline"), "all_cards", lambda: cards)
    for devices, overlap, shared in (("4", -4, 36), ("4", 16, 16), ("1", -4, 16), ("4", 0, 0)):
        asker.machine = card
        found = asker.ask(graph(
            "WanChunkedSampler", window_frames=81, window_overlap=overlap, num_frames=321,
            devices=devices,
        ))  # fmt: skip
        assert f"{shared} shared" in json.dumps(found), (devices, overlap)
        assert ("overlap 16 -> 36 frames" in json.dumps(found)) == (shared == 36)


# -- what can be done ---------------------------------------------------------------------------
def apply(nodes: dict[str, Any], fix: dict[str, Any]) -> dict[str, Any]:
    changed = json.loads(json.dumps(nodes))
    for change in fix.get("set", ()):
        changed[change["node"]]["inputs"][change["widget"]] = change["value"]
    if "insert" in fix:
        new, before = fix["insert"], changed[fix["insert"]["before"]]
        inputs = {"pipeline": before["inputs"]["pipeline"], **new["values"]}
        changed["9"] = {"class_type": new["class_type"], "inputs": inputs}
        before["inputs"]["pipeline"] = ["9", 0]
    return dict(changed)


@pytest.mark.parametrize(
    "sampler",
    ["WanGenerate", "WanChunkedSampler", pytest.param("WanEstimateMemory", marks=pytest.mark.slow)],
)
def test_every_fix_makes_it_fit(asker: Asker, sampler: str) -> None:
    asker.machine = machines.gpu(4, ram=64)
    more = {"window_frames": 201, "window_overlap": 16} if sampler == "WanChunkedSampler" else {}
    nodes = graph(sampler, width=1280, height=720, num_frames=201, **more)
    # The model's own windows would be taken by themselves for a clip longer than the model's.
    nodes["2"] = {
        "class_type": "WanOptimize", "inputs": {"pipeline": ["1", 0], "fallback_window_frames": -1}
    }  # fmt: skip
    nodes["3"]["inputs"]["pipeline"] = ["2", 0]
    quick = asker.ask(nodes)
    assert quick["fits"] is False and quick["fixes"] == []
    assert quick["headline"].startswith("Does not fit: ")
    assert told_by_the_page(quick) == quick["headline"]
    assert any(stage["over"] for stage in quick["stages"])
    found = asker.ask(nodes, fixes=True)["fixes"]
    labels = " ".join(fix["label"] for fix in found)
    assert "frames (" in labels and "windows" in labels, labels
    for fix in found:
        assert asker.ask(apply(nodes, fix))["fits"] is True, fix


def test_a_smaller_text_encoder_is_offered_where_it_is_enough(asker: Asker) -> None:
    asker.machine = machines.cpu(10)
    small = {"model": "wan2.1_t2v_1.3B_fp16.safetensors", "low_noise_model": "auto"}
    nodes = graph(loader=small, width=480, height=480, num_frames=17)
    found = asker.ask(nodes, fixes=True)
    assert found["fits"] is False and "GiB of RAM" in found["headline"]
    assert told_by_the_page(found) == found["headline"]
    fix = found["fixes"][0]
    assert fix["set"] == [{"node": "1", "widget": "text_encoder", "value": TEXT_8}]
    assert asker.ask(apply(nodes, fix))["fits"] is True


def test_a_ram_that_is_short_is_what_does_not_fit(asker: Asker) -> None:
    asker.machine = machines.gpu(6, ram=2)
    small = {"model": "wan2.1_t2v_1.3B_fp16.safetensors", "low_noise_model": "auto"}
    found = asker.ask(graph(loader=small, width=480, height=480, num_frames=17))
    assert found["fits"] is False
    assert "GiB of RAM are needed, 1.0 can be used" in found["headline"]
    assert told_by_the_page(found) == found["headline"]


def test_swapped_experts_are_told_with_the_button_that_swaps_them(asker: Asker) -> None:
    nodes = graph(loader={"model": LOW, "low_noise_model": HIGH})
    found = asker.ask(nodes, fixes=True)
    text = found["error"] if not found["ok"] else found["warnings"][0]
    assert "swapped" in text
    swap = next(fix for fix in found["fixes"] if "Swap" in fix["label"])
    right = asker.ask(apply(nodes, swap), fixes=True)
    assert right["ok"] and right["fixes"] == []
    assert not any("swapped" in text for text in right["warnings"])


# -- the machine --------------------------------------------------------------------------------
def test_while_a_prompt_runs_the_machine_counts_as_it_was_before(asker: Asker) -> None:
    before = asker.ask(graph())
    asker.busy, asker.machine = True, machines.gpu(24, ram=64, device_free_bytes=2**30)
    during = asker.ask(graph())
    assert during["while_busy"] and during["usable_gib"] == before["usable_gib"]
    asker.busy = False
    assert asker.ask(graph())["usable_gib"] < 1


# -- what is wrong ------------------------------------------------------------------------------
def body(nodes: Any, node: str = "3", **more: Any) -> bytes:
    return json.dumps({"node": node, "nodes": nodes, **more}).encode()


JUNK = {
    "nothing": b"", "no json": b"\xff{", "a list": b"[]", "a number": b"7", "null": b"null",
    "deep": b"[" * 200_000, "no nodes": b'{"node": "3"}', "empty": b'{"node": "3", "nodes": {}}',
    "nodes of texts": b'{"node": "3", "nodes": {"3": "x"}}',
    "no such node": body(graph(), "7"), "a dictionary": body(graph(width={"a": 1})),
    "many": body({str(i): {"class_type": "WanLoader", "inputs": {}} for i in range(100)}),
    "long": body(graph(prompt="x" * 300_000)), "a wrong kind": body(graph(width="wide")),
    "not finite": body(graph(width=float("nan"))), "a boolean": body(graph(steps=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_refused_in_words(asker: Asker, name: str) -> None:
    status, answer = asker.live.answer(JUNK[name])
    assert status == 400 and answer["ok"] is False
    assert answer["error"] and "Traceback" not in answer["error"]


BAD = {
    "no such model": (graph(loader={"model": "../../etc/passwd"}), "model", "1"),
    "a path": (graph(loader={"vae": "/etc/passwd"}), "vae", "1"),
    "a parent": (graph(loader={"text_encoder": f"../text_encoders/{TEXT}"}), "text_encoder", "1"),
    "wide": (graph(width=10**6), "width", "3"),
    "negative": (graph(num_frames=-1), "num_frames", "3"),
    "no frames, no video": (graph(num_frames=0), "num_frames", "3"),
    "sampler": (graph(scheduler="magic"), "scheduler", "3"),
    "a picture": ({**graph(), "3": {"class_type": "WanGenerate", "inputs": {
        "pipeline": ["1", 0], "start_image": ["8", 0]}}}, "start_image", "3"),
    "overlap": (graph("WanChunkedSampler", window_frames=17, window_overlap=17),
                "window_overlap", "3"),
    "no text encoder": (graph(loader={"text_encoder": "none"}), "prompt", "3"),
    "segments": (graph("WanChunkedSampler", mode="continuation"), "mode", "3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_told_with_its_node_and_input(asker: Asker, name: str) -> None:
    nodes, field, node = BAD[name]
    found = asker.ask(nodes)
    assert found["ok"] is False and field in found["error"]
    assert (found["field"], found["node"]) == (field, node)


def test_a_graph_wired_half_is_told(asker: Asker) -> None:
    nodes = graph()
    del nodes["3"]["inputs"]["pipeline"]
    assert "No model is connected" in asker.ask(nodes)["error"]
    gone = graph()
    del gone["1"]
    assert "No model is connected" in asker.ask(gone)["error"]
    circle = graph()
    circle["3"]["inputs"]["pipeline"] = ["3", 0]
    other = {"class_type": "WanOptimize", "inputs": {"pipeline": ["2", 0]}}
    assert "circle" in asker.ask({**circle, "2": other}, "2")["error"]
    strange = {**graph(), "1": {"class_type": "Elsewhere", "inputs": {}}}
    found = asker.live.answer(body(strange))
    assert found[0] in (200, 400) and "Elsewhere" in found[1]["error"]


def test_headers_are_read_once_and_again_when_a_file_was_changed(
    pack: ModuleType, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect, read = part(pack, "wan_core.detect"), []
    plain = detect.inspect_file
    monkeypatch.setattr(detect, "inspect_file", lambda path: read.append(path) or plain(path))
    auto = {"text_encoder": "auto", "vae": "auto"}
    asker.ask(graph(loader=auto))
    seen = len(read)
    assert seen == len({str(path) for path in read})
    asker.ask(graph(loader=auto, num_frames=41))
    assert len(read) == seen
    asker.folders.files["vae"][VAE].touch()
    asker.ask(graph(loader=auto))
    assert len(read) == seen + 1


# -- the route ----------------------------------------------------------------------------------
async def chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 65536):
        yield data[start : start + 65536]


def sent(route: Any, headers: dict[str, str], data: bytes) -> tuple[int, dict[str, Any]]:
    status, answer = asyncio.run(route.answer(headers, chunks(data)))
    return status, json.loads(answer)


def test_only_the_page_itself_may_ask(pack: ModuleType, asker: Asker) -> None:
    route = part(pack, "nodes.route").Route(asker.live, asker.live)
    asked = body(graph())
    here = {"Origin": "http://127.0.0.1:8188", "Sec-Fetch-Site": "same-origin"}
    assert sent(route, JSON | here, asked)[0] == 200
    assert sent(route, JSON, asked)[0] == 200  # a program without an origin
    assert sent(route, {"Host": "127.0.0.1:8188"}, asked)[0] == 415
    form = {**JSON, "Content-Type": "text/plain"}
    assert sent(route, form, asked)[0] == 415
    other = {"Origin": "http://example.com"}
    assert sent(route, JSON | other, asked)[0] == 403
    for site in ("cross-site", "same-site"):
        assert sent(route, JSON | other | {"Sec-Fetch-Site": site}, asked)[0] == 403


def test_a_long_request_is_not_read_to_its_end(pack: ModuleType, asker: Asker) -> None:
    taken = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            taken.append(1)
            yield bytes(65536)

    route = part(pack, "nodes.route").Route(asker.live, asker.live)
    status, _ = asyncio.run(route.answer(JSON, endless()))
    assert status == 413 and len(taken) == 5


def test_a_plan_does_not_wait_for_a_search(pack: ModuleType, asker: Asker) -> None:
    """What would fit takes a second while a render computes; sizes are dragged on meanwhile."""
    begun, done = threading.Event(), threading.Event()

    class Searching:
        def answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
            begun.set()
            assert done.wait(60)
            return asker.live.answer(body)

    route = part(pack, "nodes.route").Route(asker.live, Searching())

    async def both() -> list[int]:
        search = asyncio.create_task(route.answer(JSON, chunks(body(graph(), fixes=True))))
        await asyncio.to_thread(begun.wait, 60)
        plan = await asyncio.wait_for(route.answer(JSON, chunks(body(graph()))), 60)
        unfinished = not search.done()
        done.set()
        return [plan[0], (await search)[0], unfinished]

    assert asyncio.run(both()) == [200, 200, True]
    assert sent(route, JSON, b"[")[0] == 400  # what is no request is answered as quickly


def test_of_a_flood_some_are_put_off_and_none_is_lost(pack: ModuleType, asker: Asker) -> None:
    module = part(pack, "nodes.route")
    route = module.Route(asker.live, asker.live)

    async def flood() -> list[tuple[int, bytes]]:
        return await asyncio.gather(*(route.answer(JSON, chunks(body(graph()))) for _ in range(30)))

    found = [status for status, _ in asyncio.run(flood())]
    assert set(found) == {200, 429} and found.count(200) == module.MOST_WAITING
    assert sent(route, JSON, body(graph()))[0] == 200
