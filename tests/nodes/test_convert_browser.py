"""Convert to WanFit on a real page: ComfyUI's own templates, undone again, and equal latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import reference_layouts as layouts
from support.comfy_browser import IN_A_BROWSER
from support.comfy_graphs import latent_of
from support.comfy_server import ComfyServer
from support.tiny_models import make_transformer, make_vae

MADE = (
    "image_to_video_wan", "text_to_video_wan", "video_wan2_2_14B_flf2v",
    "video_wan2.1_fun_camera_v1.1_14B", "video_wan2_2_14B_fun_camera",
    "video_wan2_2_14B_fun_control", "video_wan2_2_5B_fun_control", "wan2.1_fun_control",
    "video_wan2_2_14B_fun_inpaint", "video_wan2_2_14B_i2v", "video_wan2_2_14B_t2v",
    "video_wan2_2_5B_ti2v", "video_wan_ati", "video_wan_vace_14B_ref2v",
    "video_wan_vace_14B_t2v", "video_wan_vace_14B_v2v", "video_wan_vace_flf2v",
    "video_wan_vace_inpainting", "video_wan_vace_outpainting", "video_wanmove_480p",
    "wan2.1_flf2v_720_f16", "wan2.1_fun_inp", "video_wan_animate2", "video_wan_animate2_distilled",
)  # fmt: skip
"""Templates whose model is run (docs/templates.md) and that have samplers of their own."""
LEFT = ("video_wan2_2_14B_s2v", "video_wan2_2_14B_animate")
BESIDE = ("video_wan_animate2", "video_wan_animate2_distilled")
"""Templates that also show a clip beside its source, by a CreateVideo of their own."""
NATIVE = {
    "KSampler", "KSamplerAdvanced", "UNETLoader", "VAEDecode", "WanImageToVideo", "WanVaceToVideo",
    "CreateVideo",
}  # fmt: skip
API = """async () => Object.fromEntries(Object.entries((await app.graphToPrompt()).output)
    .map(([id, node]) => [id, {class_type: node.class_type, inputs: node.inputs}]))"""

pytestmark = IN_A_BROWSER


def template(server: ComfyServer, name: str) -> dict[str, Any] | None:
    """Return one of the templates that this ComfyUI ships, or None."""
    packages = server.python.parent.parent.glob("lib/python*/site-packages")
    for root in packages:
        for path in root.glob(f"comfyui_workflow_templates*/templates/{name}.json"):
            return dict(json.loads(path.read_text()))
    return None


def opened(page: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """Load a workflow, close what opens over it, and return what Run would send."""
    page.evaluate("async workflow => { await app.loadGraphData(workflow) }", saved)
    page.wait_for_timeout(800)
    for _ in range(20):  # that files are missing, which these tests do not need
        if not page.query_selector(".p-dialog-mask"):
            break
        page.keyboard.press("Escape")
        page.wait_for_timeout(300)
    return dict(page.evaluate(API))


def convert(page: Any) -> dict[str, Any]:
    page.evaluate("async () => await app.extensionManager.command.execute('WanFit.Convert')")
    return dict(page.evaluate(API))


def close_toasts(page: Any) -> None:
    page.evaluate("() => app.extensionManager.toast.removeAll?.()")
    page.evaluate(
        "() => document.querySelectorAll('.p-toast-close-button').forEach(b => b.click())"
    )
    page.wait_for_function("!document.querySelector('.p-toast-message')")


@pytest.mark.parametrize("name", MADE)
def test_a_shipped_template_becomes_ours(page: Any, server: ComfyServer, name: str) -> None:
    saved = template(server, name)
    if saved is None:
        pytest.skip(f"this ComfyUI ships no {name}")
    before = opened(page, saved)
    after = convert(page)
    kinds = [node["class_type"] for node in after.values()]
    samplers = [node["inputs"] for node in after.values() if node["class_type"] == "WanGenerate"]
    files = {value for node in before.values() for value in node["inputs"].values()
             if isinstance(value, str) and value.endswith(".safetensors")}  # fmt: skip
    native = NATIVE - {"CreateVideo"} if name in BESIDE else NATIVE
    assert samplers and not native & set(kinds), kinds
    for node in after.values():
        if node["class_type"] == "WanLoader":
            named = {node["inputs"][one] for one in ("model", "text_encoder", "vae")}
            assert named <= files | ({"none"} if "CLIPTextEncode" in kinds else set())
    for sampler in samplers:
        assert sampler["pipeline"][0] in after and sampler["steps"] >= 3
        assert sampler["sigma_schedule"] == "simple"
    assert "SaveVideo" in kinds or "SaveAnimatedWEBP" in kinds
    for node in after.values():  # nothing hangs in the air
        links = [v for v in node["inputs"].values() if isinstance(v, list) and len(v) == 2]
        assert all(str(link[0]) in after for link in links), node
    close_toasts(page)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
    page.wait_for_function("!app.graph._nodes.some(node => node.type === 'WanGenerate')")
    assert sorted(n["class_type"] for n in page.evaluate(API).values()) == sorted(
        node["class_type"] for node in before.values()
    )


@pytest.mark.parametrize("name", LEFT)
def test_a_template_of_another_model_stays_as_it_is(
    page: Any, server: ComfyServer, name: str
) -> None:
    saved = template(server, name)
    if saved is None:
        pytest.skip(f"this ComfyUI ships no {name}")
    before = opened(page, saved)
    assert convert(page) == before
    close_toasts(page)


def test_the_official_image_to_video_template_is_ours_in_two_clicks(
    page: Any, server: ComfyServer
) -> None:
    saved = template(server, "video_wan2_2_14B_i2v")
    assert saved is not None
    opened(page, saved)
    version = server.get("/system_stats")["system"]["comfyui_version"]
    entries = page.locator(".litemenu-entry, [role=menuitem]")
    if version.startswith("0.3."):  # its canvas takes no entries of packs: the main menu has one
        page.locator(".comfyui-logo-wrapper, .comfy-command-menu-button").first.click()  # one
        entries.filter(has_text="WanFit").first.hover()
    else:
        page.mouse.click(1100, 700, button="right")  # one, where nothing is
    entries.filter(has_text="Convert to WanFit").last.click()  # two
    page.wait_for_function("app.graph._nodes.some(node => node.type === 'WanGenerate')")
    close_toasts(page)


STRAY = """() => {
    const graph = app.graph.rootGraph ?? app.graph;
    const add = (to, type, title, mode) => {
        const node = Object.assign(LiteGraph.createNode(type), {title, mode});
        to.add(node);
        return node;
    };
    const host = graph._nodes.find(node => node.subgraph);  // none in older templates
    const inner = host?.subgraph ?? graph;
    add(inner, "MarkdownNote", "a note inside", 0);
    const text = inner._nodes.find(node => node.type === "CLIPTextEncode" && node.mode === 0);
    text.widgets[0].value = "a {red|blue} fox";
    const giver = host ?? graph._nodes.find(node => node.type === "CreateVideo" && node.mode === 0);
    giver.connect(0, add(graph, "SaveVideo", "a second video", 4), 0);
    if (host) return true;
    const sampler = graph._nodes.find(node => node.type === "KSamplerAdvanced" && node.mode === 0
        && node.widgets.some(one => one.name === "add_noise" && one.value === "enable"));
    const seed = add(graph, "PrimitiveNode", "a seed", 0);
    seed.connect(0, sampler, sampler.inputs.findIndex(input => input.name === "noise_seed"));
    seed.widgets.find(one => one.name === "control_after_generate").value = "increment";
    return false;
}"""
SAMPLER = "app.graph._nodes.find(node => node.type === 'WanGenerate')"
TOLD = """() => app.graph._nodes.filter(node => node.type === "MarkdownNote")
    .map(node => node.widgets[0].value).join("\\n")"""


def test_what_no_prompt_holds_is_kept_or_said(page: Any, server: ComfyServer) -> None:
    """Wildcards, which Run chooses from each time; nodes that are switched off; notes."""
    saved = template(server, "video_wan2_2_14B_i2v")
    assert saved is not None
    opened(page, saved)
    inside = page.evaluate(STRAY)
    convert(page)
    texts = page.evaluate(
        f"() => {SAMPLER}.widgets.filter(one => one.name.endsWith('prompt')).map(one => one.value)"
    )
    assert "a {red|blue} fox" in texts
    told = page.evaluate(TOLD)
    assert ("a note inside was in a subgraph that is gone" in told) == inside
    assert "a second video was switched off" in told
    if not inside:
        after = "node.widgets.find(one => one.name === 'control_after_generate').value"
        assert page.evaluate(f"() => {{ const node = {SAMPLER}; return {after} }}") == "increment"
    # A primitive is of the page alone: its value is taken over.
    assert not page.evaluate("() => app.graph._nodes.some(node => node.title === 'a seed')")
    close_toasts(page)


def parity_files(folder: Path, family: str) -> tuple[str, str]:
    """Write two small experts as published, which ComfyUI's own loader opens too, and a VAE."""
    names = []
    for name, seed in (("high", 3), ("low", 4)):
        torch.manual_seed(seed)
        shape = {"num_attention_heads": 1, "attention_head_dim": 128, "text_dim": 4096}
        model = make_transformer(family, **shape)
        with torch.no_grad():  # a fresh one moves the latents by hardly anything
            model.proj_out.weight.mul_(4.0)
        kind = family.split("-")[1]
        names.append(f"wan2.2_{kind}_{name}_noise_14B_fp16.safetensors")
        save_file(
            layouts.original_transformer(layouts.state_of(model)),
            folder / "diffusion_models" / names[-1],
        )
    shape = {"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    vae = layouts.original_vae(layouts.state_of(make_vae("wan2.1-t2v", **shape)), 2)
    save_file(vae, folder / "vae" / "wan_2.1_vae.safetensors")
    return names[0], names[1]


@pytest.mark.parametrize("case", ["two", "one", "pieces", "picture"])
def test_the_converted_prompt_makes_the_latents_of_the_native_one(
    server: ComfyServer, case: str
) -> None:
    """Two experts with euler, one model with a solver of several steps or with a sampler in pieces,
    or a start image of other proportions than the clip for two experts."""
    two = case not in ("one", "pieces")
    models = server.base / "models"
    for folder in ("diffusion_models", "vae"):
        (models / folder).mkdir(exist_ok=True)
    high, low = parity_files(models, "wan2.2-i2v-a14b" if case == "picture" else "wan2.1-t2v")
    torch.manual_seed(5)
    for name, tokens in (("good", 9), ("bad", 4)):
        text = torch.zeros(1, 512, 4096)
        text[:, :tokens] = torch.randn(1, tokens, 4096)
        torch.save(text, server.base / "input" / f"{name}.pt")
    shared = {
        "positive": ["5", 0], "negative": ["6", 0], "steps": 6, "cfg": 3.5,
        "sampler_name": "euler" if two else "uni_pc", "scheduler": "simple", "noise_seed": 5,
    }  # fmt: skip
    size = {"width": 64, "height": 48, "length": 9, "batch_size": 1}
    unet = {"weight_dtype": "default"}
    nodes = {
        "1": ("UNETLoader", unet | {"unet_name": high}),
        "2": ("UNETLoader", unet | {"unet_name": low}),
        "3": ("ModelSamplingSD3", {"model": ["1", 0], "shift": 5.0}),
        "4": ("ModelSamplingSD3", {"model": ["2", 0], "shift": 5.0}),
        "5": ("WanFitProbeConditioning", {"name": "good"}),
        "6": ("WanFitProbeConditioning", {"name": "bad"}),
        "7": ("EmptyHunyuanLatentVideo", size),
        "8": ("KSamplerAdvanced", shared | {
            "model": ["3", 0], "latent_image": ["7", 0], "add_noise": "enable",
            "start_at_step": 0, "end_at_step": 3, "return_with_leftover_noise": "enable",
        }),
        "9": ("KSamplerAdvanced", shared | {
            "model": ["4", 0], "latent_image": ["8", 0], "add_noise": "disable",
            "start_at_step": 3, "end_at_step": 10000, "return_with_leftover_noise": "disable",
        }),
        "10": ("SaveLatent", {"samples": ["9", 0], "filename_prefix": "latents/native"}),
    }  # fmt: skip
    if not two:
        whole = {"seed": 5, "denoise": 1.0, "model": ["3", 0], "latent_image": ["7", 0]}
        nodes["9"] = ("KSampler", {k: v for k, v in shared.items() if k != "noise_seed"} | whole)
        nodes = {name: one for name, one in nodes.items() if name not in ("2", "4", "8")}
    if case == "pieces":  # the steps have the shift of their own model, and 11 frames are 9
        guided = {"model": ["3", 0], "positive": ["5", 0], "negative": ["6", 0], "cfg": 3.5}
        pieces = {
            "noise": ["22", 0],
            "guider": ["23", 0],
            "sampler": ["21", 0],
            "sigmas": ["20", 0],
        }
        nodes |= {
            "7": ("EmptyHunyuanLatentVideo", size | {"length": 11}),
            "9": ("SamplerCustomAdvanced", pieces | {"latent_image": ["7", 0]}),
            "19": ("ModelSamplingSD3", {"model": ["1", 0], "shift": 9.0}),
            "20": ("BasicScheduler", {
                "model": ["19", 0], "scheduler": "simple", "steps": 6, "denoise": 1.0,
            }),
            "21": ("KSamplerSelect", {"sampler_name": "euler"}),
            "22": ("RandomNoise", {"noise_seed": 5}),
            "23": ("CFGGuider", guided),
        }  # fmt: skip
    if case == "picture":
        picture = Image.effect_mandelbrot((90, 40), (-2, -1, 1, 1), 50).convert("RGB")
        picture.save(server.base / "input" / "wide.png")
        begun = {"positive": ["5", 0], "negative": ["6", 0], "start_image": ["12", 0]}
        nodes |= {
            "7": ("WanImageToVideo", size | begun | {"vae": ["11", 0]}),
            "11": ("VAELoader", {"vae_name": "wan_2.1_vae.safetensors"}),
            "12": ("LoadImage", {"image": "wide.png"}),
        }
        for name in ("8", "9"):
            nodes[name][1].update(positive=["7", 0], negative=["7", 1])
        nodes["8"][1]["latent_image"] = ["7", 2]
    prompt = {name: {"class_type": kind, "inputs": given} for name, (kind, given) in nodes.items()}
    server.run(prompt)
    answer = server.post("/wanfit/convert", {"prompt": prompt})
    assert answer["ok"] and answer["left"] == []
    assert len(answer["new"]) == (3 if case == "picture" else 2)
    answer["prompt"]["10"]["inputs"]["filename_prefix"] = "latents/ours"
    server.run(answer["prompt"])
    native, ours = latent_of(server, "native"), latent_of(server, "ours")
    assert ours.shape == native.shape
    assert (ours - native).norm() < 1e-4 * native.norm()
