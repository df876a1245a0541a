"""What the WanFit tab shows and does, without ComfyUI: renders, saved ones, learnt, preferred."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import tiny_models
from support.as_pack import part

WORKFLOW = {"workflow": '{"nodes": [1]}', "prompt": "{}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tiny_models.make_folder(root / "t2v", "wan2.1-t2v")
    return root / "t2v"


class Asked:
    """A tab of its own, whose files lie in a folder of the test."""

    def __init__(self, pack: ModuleType, root: Path) -> None:
        self.root = root
        self.session = part(pack, "nodes.session").Session(lambda: 1000.0)
        self.tab = part(pack, "nodes.tab").Tab(self.session, lambda: root)

    def __call__(self, status: int = 200, **asked: Any) -> dict[str, Any]:
        found, answer = self.tab.answer(json.dumps(asked).encode())
        assert found == status, answer
        json.dumps(answer, allow_nan=False)
        return dict(answer)


@pytest.fixture
def asked(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.setenv("WANFIT_PREFERENCES", str(tmp_path / "preferences.json"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Asked(pack, tmp_path / "journals")


def job(pack: ModuleType, **more: Any) -> Any:
    return part(pack, "wan_core").GenerationConfig(
        prompt="a red cat", width=32, height=32, num_frames=9, num_inference_steps=3,
        guidance_scale=1.0, seed=2**63, return_frames=True, **more,
    )  # fmt: skip


def test_renders_are_told_with_what_was_predicted_and_measured(
    pack: ModuleType, asked: Asked, model: Path
) -> None:
    wrapper = part(pack, "wan_core").WanPipelineLoader().load_wan_pipeline(model, device="cpu")
    config = job(pack)
    request, plan = wrapper.plan(config)
    assert asked(do="show")["renders"] == []
    with asked.session.render("7", request, plan, wrapper.architecture) as ended:
        assert asked(do="show")["renders"][0]["state"] == "running"
        ended(wrapper.generate(config), {"filename": "a.mp4"})
    (one,) = asked(do="show")["renders"]
    assert (one["state"], one["node"], one["clip"]) == ("done", "7", {"filename": "a.mp4"})
    assert one["seed"] == str(2**63) and (one["width"], one["frames"], one["steps"]) == (32, 9, 3)
    assert one["seconds"] > 0 and one["measured_gib"] > 0.05 and one["predicted_gib"] > 0
    assert {"text encode", "denoise", "decode"} <= {stage["name"] for stage in one["stages"]}

    class Stop(Exception):
        pass

    with pytest.raises(Stop), asked.session.render("7", request, plan, wrapper.architecture):
        raise Stop
    assert [one["state"] for one in asked(do="show")["renders"]] == ["interrupted", "done"]
    failed = part(pack, "wan_core").VideoGenerationResult(success=False, errors=["no room"])
    with asked.session.render("7", request, plan, wrapper.architecture) as ended:
        ended(failed, None)
    latest = asked(do="show")["renders"][0]
    assert (latest["state"], latest["errors"], latest["measured_gib"]) == (
        "failed", ["no room"], None
    )  # fmt: skip


def cut_off(pack: ModuleType, model: Path, root: Path, **more: Any) -> None:
    """Have a render with a journal end after its second step."""

    class Cut(Exception):
        pass

    def cut(done: int, total: int, latents: torch.Tensor) -> None:
        if done == 2:
            raise Cut

    wrapper = part(pack, "wan_core").WanPipelineLoader().load_wan_pipeline(model, device="cpu")
    config = job(pack, resume="auto", journal_folder=root, progress_callback=cut, **more)
    with pytest.raises(Cut):
        wrapper.generate(config)


def test_a_render_that_was_cut_off_can_go_on_or_be_deleted(
    pack: ModuleType, asked: Asked, model: Path
) -> None:
    cut_off(pack, model, asked.root, output_metadata=WORKFLOW)
    (one,) = asked(do="show")["saved"]
    assert (one["step"], one["steps"], one["only_decode"]) == (2, 3, False)
    assert one["model"] == "wan2.1-t2v-1.3b" or one["model"].startswith("wan2.1")
    assert one["prompt"] == "a red cat" and one["job"]["seed"] == str(2**63)
    assert one["workflow"] and not one["running"] and one["own"]
    folder = asked.root / one["id"]
    files = sum(path.stat().st_size for path in folder.iterdir())
    assert one["gib"] * 2**30 == files > 1000
    assert asked(do="workflow", id=one["id"])["workflow"] == {"nodes": [1]}
    # A run that has the journal keeps it.
    lock = part(pack, "wan_core.journal.disk").try_lock(folder / "lock")
    assert "A render is at it now" in asked(400, do="delete", id=one["id"])["error"]
    lock.close()
    (folder / "of a user.txt").write_text("mine")
    assert asked(do="delete", id=one["id"])["saved"] == []
    assert [path.name for path in folder.iterdir()] == ["of a user.txt"]


def test_without_a_workflow_it_is_told_how_to_go_on(
    pack: ModuleType, asked: Asked, model: Path
) -> None:
    cut_off(pack, model, asked.root)
    (one,) = asked(do="show")["saved"]
    assert not one["workflow"]
    assert "press Run" in asked(400, do="workflow", id=one["id"])["error"]
    # A state that is damaged does not hide it, and breaks nothing.
    for path in (asked.root / one["id"]).glob("*.safetensors"):
        path.write_bytes(b"\x00" * 50)
    assert asked(do="show")["saved"][0]["step"] is None
    (asked.root / one["id"] / "identity.json").write_text("{")
    assert asked(do="show")["saved"] == []


def test_who_has_just_come_gets_an_example(asked: Asked) -> None:
    found = asked(do="example")
    kinds = {node["type"] for node in found["workflow"]["nodes"]}
    assert {"WanLoader", "WanGenerate"} <= kinds and found["name"] == "text_to_video"


def test_no_path_comes_from_the_page(asked: Asked, tmp_path: Path) -> None:
    victim = asked.root.parent / ("a" * 32)
    victim.mkdir()
    (victim / "identity.json").write_text("{}")
    for key in ("..", "../" + "a" * 32, str(victim), "a" * 32, "", "A" * 32, "a" * 5000):
        assert "no such saved render" in asked(400, do="delete", id=key)["error"]
    assert (victim / "identity.json").exists()


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"do": "rm"}', b'{"do": "delete"}',
                                  b'{"do": "delete", "id": 3}', b'{"do": "prefer"}',
                                  b'{"do": "prefer", "values": {"path": "/"}}',
                                  b'{"do": "prefer", "values": {"speed": "warp"}}',
                                  b'{"do": ["show"]}', b"[" * 9000])  # fmt: skip
def test_junk_is_refused(asked: Asked, body: bytes, tmp_path: Path) -> None:
    status, answer = asked.tab.answer(body)
    assert status == 400 and answer["error"] and not (tmp_path / "preferences.json").exists()


def test_preferences_are_kept_and_forgotten(asked: Asked, tmp_path: Path) -> None:
    found = asked(do="prefer", values={"speed": "fast", "preview": False, "codec": None})
    assert found["preferences"] == {
        "speed": "fast", "vram_limit_gb": None, "ram_limit_gb": None, "preview": False,
        "codec": None, "journal": None,
    }  # fmt: skip
    assert json.loads((tmp_path / "preferences.json").read_text()) == {
        "speed": "fast", "preview": False
    }  # fmt: skip
    assert asked(do="prefer", values={})["preferences"]["speed"] is None
    (tmp_path / "preferences.json").write_text("{")
    assert "Preferences not used" in asked(do="show")["warnings"][0]
    (tmp_path / "preferences.json").unlink()
    (tmp_path / "preferences.json").mkdir()
    assert (
        "Cannot write" in asked(do="prefer", values={})["error"]
        or "folder" in asked(do="prefer", values={})["error"]
    )


def test_what_was_learnt_is_told_and_can_be_forgotten(pack: ModuleType, asked: Asked) -> None:
    memory = part(pack, "wan_core.memory")
    for pace in (1.2, 1.4):
        memory.Calibrations().add(
            "H100, torch 2.13, t2v", memory.RunRecord(extra=0.05, pace=pace, forward="lean")
        )
    memory.AttentionTimes().keep("H100", "now", "shape", {"sdpa": 1.0})
    assert asked(do="show")["learnt"] == [
        {"what": "H100, torch 2.13, t2v", "runs": 2, "pace": pytest.approx(1.3), "extra": 0.05}
    ]
    assert asked(do="forget")["learnt"] == []
    assert memory.AttentionTimes().of("H100") == {}
    assert asked(do="forget")["ok"]  # nothing there is no fault


def test_another_site_may_not_ask(pack: ModuleType, asked: Asked) -> None:
    route = part(pack, "nodes.route").Route(None, None)

    async def body() -> AsyncIterator[bytes]:
        yield b'{"do": "forget"}'

    headers = {"Content-Type": "application/json", "Host": "a", "Origin": "http://b"}
    status, _ = asyncio.run(route.answer(headers, body(), asked.tab.answer, 100))
    assert status == 403
    status, _ = asyncio.run(route.answer(headers | {"Origin": "http://a"}, body(),
                                         asked.tab.answer, 10))  # fmt: skip
    assert status == 413
