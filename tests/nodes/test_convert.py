"""ComfyUI's own Wan nodes become ours: the same files and settings; the rest is kept, or said."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest
from support.as_pack import part

HIGH, LOW = "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_i2v_low_noise.safetensors"
Nodes = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def one_sampler(**changed: dict[str, Any]) -> Nodes:
    """Text to video with one transformer, a LoRA and a shift, as people save it."""
    nodes = {
        "37": node("UNETLoader", unet_name="wan2.1_t2v_1.3B.safetensors", weight_dtype="default"),
        "38": node("CLIPLoader", clip_name="umt5.safetensors", type="wan", device="default"),
        "39": node("VAELoader", vae_name="wan_2.1_vae.safetensors"),
        "36": node("LoraLoaderModelOnly", model=["37", 0], lora_name="a.sft", strength_model=0.3),
        "48": node("ModelSamplingSD3", model=["36", 0], shift=8.000000000000002),
        "6": node("CLIPTextEncode", clip=["38", 0], text="a fox"),
        "7": node("CLIPTextEncode", clip=["38", 0], text="bad"),
        "40": node("EmptyHunyuanLatentVideo", width=832, height=480, length=33, batch_size=1),
        "3": node(
            "KSampler", model=["48", 0], positive=["6", 0], negative=["7", 0],
            latent_image=["40", 0], seed=7, steps=30, cfg=6.0, sampler_name="uni_pc",
            scheduler="simple", denoise=1.0,
        ),
        "8": node("VAEDecode", samples=["3", 0], vae=["39", 0]),
        "49": node("CreateVideo", images=["8", 0], fps=16.0),
        "50": node("SaveVideo", video=["49", 0], filename_prefix="video"),
    }  # fmt: skip
    return nodes | changed


def two_samplers(**changed: dict[str, Any]) -> Nodes:
    """Image to video with two experts in a subgraph; a switch chooses a few steps with LoRAs."""
    nodes: Nodes = {
        "97": node("LoadImage", image="dragon.png"),
        "129:131": node("PrimitiveBoolean", value=True),
        "129:90": node("VAELoader", vae_name="wan_2.1_vae.safetensors"),
        "129:84": node("CLIPLoader", clip_name="umt5.safetensors", type="wan"),
        "129:93": node("CLIPTextEncode", clip=["129:84", 0], text="a dragon"),
        "129:89": node("CLIPTextEncode", clip=["129:84", 0], text=""),
        "129:161": node("PrimitiveFloat", value=5.0),
        "129:162": node("PrimitiveFloat", value=16.0),
        "129:163": node(
            "ComfyMathExpression", expression="floor (a * b + 1)",
            **{"values.a": ["129:161", 0], "values.b": ["129:162", 0]},
        ),
        "129:98": node(
            "WanImageToVideo", positive=["129:93", 0], negative=["129:89", 0], vae=["129:90", 0],
            start_image=["97", 0], width=640, height=640, length=["129:163", 1], batch_size=1,
        ),
    }  # fmt: skip
    for at, (few, many) in {"steps": (4, 20), "cfg": (1.0, 3.5), "until": (2, 10)}.items():
        kind = "PrimitiveFloat" if at == "cfg" else "PrimitiveInt"
        nodes[f"129:{at}1"], nodes[f"129:{at}0"] = node(kind, value=few), node(kind, value=many)
        nodes[f"129:{at}"] = switched(f"129:{at}0", f"129:{at}1")
    for name, file, lora in (("high", HIGH, "high.sft"), ("low", LOW, "low.sft")):
        at = f"129:{name}"
        nodes[at + "0"] = node("UNETLoader", unet_name=file, weight_dtype="default")
        nodes[at + "1"] = node(
            "LoraLoaderModelOnly", model=[at + "0", 0], lora_name=lora, strength_model=1.0
        )
        nodes[at + "2"] = switched(at + "0", at + "1")
        nodes[at] = node("ModelSamplingSD3", model=[at + "2", 0], shift=5.0)
    both = {
        "positive": ["129:98", 0], "negative": ["129:98", 1], "steps": ["129:steps", 0],
        "cfg": ["129:cfg", 0], "sampler_name": "euler", "scheduler": "simple",
    }  # fmt: skip
    nodes["129:86"] = node(
        "KSamplerAdvanced", model=["129:high", 0], latent_image=["129:98", 2], noise_seed=11,
        add_noise="enable", start_at_step=0, end_at_step=["129:until", 0], **both,
    )  # fmt: skip
    nodes["129:85"] = node(
        "KSamplerAdvanced", model=["129:low", 0], latent_image=["129:86", 0], noise_seed=0,
        add_noise="disable", start_at_step=["129:until", 0], end_at_step=10000, **both,
    )  # fmt: skip
    nodes["129:87"] = node("VAEDecode", samples=["129:85", 0], vae=["129:90", 0])
    nodes["129:94"] = node("CreateVideo", images=["129:87", 0], fps=["129:162", 0])
    nodes["108"] = node("SaveVideo", video=["129:94", 0], filename_prefix="video")
    return nodes | changed


def switched(off: str, on: str) -> dict[str, Any]:
    return node("ComfySwitchNode", switch=["129:131", 0], on_false=[off, 0], on_true=[on, 0])


def converted(pack: ModuleType, nodes: Nodes) -> Any:
    native, convert = part(pack, "nodes.native"), part(pack, "nodes.convert")
    found = convert.convert(native.read_prompt(nodes, 200))
    for name, one in found.prompt.items():  # every link leads to a node that is there
        links = [v for v in one["inputs"].values() if native.as_link(v)]
        assert all(link[0] in found.prompt for link in links), (name, one)
    return found


def only(found: Any, kind: str) -> Any:
    """Return the inputs of the only node of a kind; pictures by what is cropped to the clip."""
    (values,) = [n["inputs"] for n in found.prompt.values() if n["class_type"] == kind]
    return {name: uncropped(found, one) for name, one in values.items()}


def uncropped(found: Any, value: Any) -> Any:
    """Return what an ImageScale of the conversion crops, in place of its link."""
    scale = found.prompt[value[0]] if isinstance(value, list) and value[0] in found.new else {}
    if scale.get("class_type") != "ImageScale":
        return value
    assert scale["inputs"]["crop"] == "center"
    return scale["inputs"]["image"]


def test_a_second_vae_stays_and_decodes_our_latents(pack: ModuleType) -> None:
    """As in the template of a transparent clip, whose other VAE makes the alpha channel."""
    nodes = one_sampler(**{
        "51": node("VAELoader", vae_name="alpha.safetensors"),
        "52": node("VAEDecode", samples=["3", 0], vae=["51", 0]),
        "86": node("JoinImageWithAlpha", image=["8", 0], alpha=["52", 0]),
        "80": node("GeminiNode", images=["86", 0]),
    })  # fmt: skip
    nodes["80"]["class_type"] = None  # its pack is missing
    found = converted(pack, nodes)
    sampler = next(k for k, n in found.prompt.items() if n["class_type"] == "WanGenerate")
    assert only(found, "WanLoader")["vae"] == "wan_2.1_vae.safetensors"
    assert only(found, "VAEDecode") == {"samples": [sampler, 2], "vae": ["51", 0]}
    assert only(found, "JoinImageWithAlpha") == {"image": [sampler, 0], "alpha": ["52", 0]}
    assert "80" in found.prompt and "8" in found.removed


def test_one_sampler_becomes_loader_lora_and_sampler(pack: ModuleType) -> None:
    found = converted(pack, one_sampler())
    assert sorted(n["class_type"] for n in found.prompt.values()) == [
        "SaveVideo", "WanGenerate", "WanLoRA", "WanLoader",
    ]  # fmt: skip
    assert only(found, "WanLoader") == {
        "model": "wan2.1_t2v_1.3B.safetensors", "low_noise_model": "none", "use_recipe": False,
        "text_encoder": "umt5.safetensors", "vae": "wan_2.1_vae.safetensors",
        "image_encoder": "auto",
    }  # fmt: skip
    lora, sampler = only(found, "WanLoRA"), only(found, "WanGenerate")
    assert (lora["lora"], lora["strength"], lora["expert"]) == ("a.sft", 0.3, "both")
    wanted = {
        "prompt": "a fox", "negative_prompt": "bad", "width": 832, "height": 480,
        "num_frames": 33, "steps": 30, "guidance_scale": 6.0, "flow_shift": 8.0,
        "scheduler": "unipc", "sigma_schedule": "simple", "seed": 7, "fps": 16.0,
        "official_negative": True, "guidance_scale_2": 0.0, "switch_step": 0,
    }  # fmt: skip
    assert {name: sampler[name] for name in wanted} == wanted
    assert only(found, "SaveVideo")["video"] == [found.new[-1], 1]
    assert found.left == [] and found.seeds == {found.new[-1]: "3"}
    assert set(found.removed) == set(one_sampler()) - {"50"}


@pytest.mark.parametrize("few", [True, False])
def test_two_experts_in_a_subgraph_with_a_switch(pack: ModuleType, few: bool) -> None:
    nodes = two_samplers()
    nodes["129:131"]["inputs"]["value"] = few
    found = converted(pack, nodes)
    loras = [n["inputs"] for n in found.prompt.values() if n["class_type"] == "WanLoRA"]
    named = [(one["lora"], one["expert"]) for one in loras]
    assert named == ([("high.sft", "high"), ("low.sft", "low")] if few else [])
    sampler, loader = only(found, "WanGenerate"), only(found, "WanLoader")
    assert (loader["model"], loader["low_noise_model"]) == (HIGH, LOW)
    steps, scale, switch = (4, 1.0, 2) if few else (20, 3.5, 10)
    assert (sampler["steps"], sampler["switch_step"]) == (steps, switch)
    assert (sampler["guidance_scale"], sampler["guidance_scale_2"]) == (scale, scale)
    assert (sampler["num_frames"], sampler["flow_shift"], sampler["seed"]) == (81, 5.0, 11)
    assert sampler["start_image"] == ["97", 0] and sampler["official_negative"] is False
    assert set(found.prompt) == {"97", "108", *found.new}
    assert found.left == []
    scaled = only(found, "ImageScale")
    assert (scaled["upscale_method"], scaled["width"], scaled["height"]) == ("bilinear", 640, 640)


def test_what_is_known_only_when_it_runs_is_wired(pack: ModuleType) -> None:
    size = node("GetImageSize", image=["97", 0])
    text = node("SomeWriter", about="dragons")
    nodes = two_samplers(**{"129:5": size, "130": text})
    nodes["129:98"]["inputs"] |= {"width": ["129:5", 0], "height": ["129:5", 1]}
    nodes["129:93"]["inputs"]["text"] = ["130", 0]
    sampler = only(converted(pack, nodes), "WanGenerate")
    assert (sampler["width"], sampler["height"]) == (["129:5", 0], ["129:5", 1])
    assert sampler["prompt"] == ["130", 0]


def test_conditioning_of_other_nodes_goes_to_the_sockets(pack: ModuleType) -> None:
    nodes = one_sampler(**{"60": node("ConditioningConcat"), "61": node("ConditioningZeroOut")})
    nodes["3"]["inputs"] |= {"positive": ["60", 0], "negative": ["61", 0]}
    sampler = only(converted(pack, nodes), "WanGenerate")
    assert sampler["positive"] == ["60", 0]
    assert (sampler["negative_prompt"], sampler["official_negative"]) == ("", False)


def test_vace_gets_a_control_and_frames_are_not_trimmed_twice(pack: ModuleType) -> None:
    nodes = one_sampler(**{
        "40": node(
            "WanVaceToVideo", positive=["6", 0], negative=["7", 0], vae=["39", 0], width=480,
            height=480, length=81, batch_size=1, strength=0.8, control_video=["70", 0],
            control_masks=["71", 0], reference_image=["72", 0],
        ),
        "70": node("LoadVideoFrames"), "71": node("LoadMask"), "72": node("LoadImage"),
        "58": node("TrimVideoLatent", samples=["3", 0], trim_amount=["40", 3]),
        "8": node("VAEDecode", samples=["58", 0], vae=["39", 0]),
        "9": node("PreviewImage", images=["8", 0]),
        "10": node("SaveLatent", samples=["58", 0]),
    })  # fmt: skip
    nodes["3"]["inputs"] |= {
        "positive": ["40", 0],
        "negative": ["40", 1],
        "latent_image": ["40", 2],
    }
    found = converted(pack, nodes)
    control, sampler = only(found, "WanControl"), found.new[-1]
    assert control == {
        "video": ["70", 0], "mask": ["71", 0], "reference": ["72", 0], "strength": 0.8
    }  # fmt: skip
    assert only(found, "PreviewImage")["images"] == [sampler, 0]
    assert only(found, "SaveLatent")["samples"] == [sampler, 2]
    assert "58" in found.removed and "8" in found.removed


@pytest.mark.parametrize(
    ("kind", "given", "ours", "sampler"),
    [
        ("WanFunControlToVideo", ("start_image", "control_video"), ("video",), "start_image"),
        ("Wan22FunControlToVideo", ("ref_image", "control_video"), ("reference", "video"), None),
        ("WanCameraImageToVideo", ("start_image", "camera_conditions"), ("camera",), "start_image"),
    ],
)
def test_fun_models_get_a_control(
    pack: ModuleType, kind: str, given: tuple[str, ...], ours: tuple[str, ...], sampler: str | None
) -> None:
    pictures = {name: [name, 0] for name in given}
    frame = node(kind, width=480, height=480, length=81, batch_size=1, **pictures)
    nodes = one_sampler(**{"40": frame}, **{name: node("LoadImage") for name in given})
    found = converted(pack, nodes)
    assert set(only(found, "WanControl")) == set(ours)
    assert only(found, "WanGenerate").get("start_image") == ([sampler, 0] if sampler else None)
    assert found.left == []


def animated(**frame: Any) -> Nodes:
    """ComfyUI's template of Animate: a KSampler, and what is in front is cut off twice."""
    nodes = one_sampler(**{
        "40": node(
            "WanAnimateToVideo", positive=["6", 0], negative=["7", 0], vae=["39", 0],
            clip_vision_output=["80", 0], reference_image=["70", 0], face_video=["71", 0],
            pose_video=["72", 0], background_video=["73", 0], character_mask=["74", 0],
            width=640, height=640, length=77, batch_size=1, continue_motion_max_frames=5,
            video_frame_offset=0,
        ),
        "58": node("TrimVideoLatent", samples=["3", 0], trim_amount=["40", 3]),
        "8": node("VAEDecode", samples=["58", 0], vae=["39", 0]),
        "30": node("ImageFromBatch", image=["8", 0], batch_index=["40", 4], length=4096),
        "49": node("CreateVideo", images=["30", 0], audio=["72", 1], fps=16.0),
        "80": node("CLIPVisionEncode", clip_vision=["81", 0], image=["70", 0]),
        "81": node("CLIPVisionLoader", clip_name="clip_vision_h.safetensors"),
        **{str(name): node("LoadSomething") for name in range(70, 75)},
    })  # fmt: skip
    nodes["40"]["inputs"] |= frame
    nodes["3"]["inputs"] |= {
        "positive": ["40", 0],
        "negative": ["40", 1],
        "latent_image": ["40", 2],
    }
    return nodes


def test_animate_gets_a_control_and_nothing_is_cut_off(pack: ModuleType) -> None:
    found = converted(pack, animated())
    assert only(found, "WanControl") == {
        "video": ["72", 0], "reference": ["70", 0], "face_video": ["71", 0],
        "background_video": ["73", 0], "mask": ["74", 0],
    }  # fmt: skip
    sampler, loader = only(found, "WanGenerate"), only(found, "WanLoader")
    assert (sampler["width"], sampler["num_frames"], sampler["fps"]) == (640, 77, 16.0)
    assert sampler["audio"] == ["72", 1] and loader["image_encoder"] == "clip_vision_h.safetensors"
    assert only(found, "SaveVideo")["video"] == [found.new[-1], 1]
    assert {"30", "49", "40", "8"} <= set(found.removed)
    (masked,) = found.left
    assert "stretched here with their mask" in masked


def test_animate_without_a_mask_draws_the_background_of_the_picture(pack: ModuleType) -> None:
    nodes = animated(length=161)
    del nodes["40"]["inputs"]["character_mask"]
    found = converted(pack, nodes)
    assert "background_video" not in only(found, "WanControl")
    segments, background = found.left
    assert "background_video of node 40 is left out" in background
    assert "161 frames are made in segments of 77" in segments


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"continue_motion": ["73", 0]}, "one of several that are joined"),
        ({"video_frame_offset": 72}, "begins within its videos"),
    ],
)
def test_a_clip_that_goes_on_from_another_is_left(
    pack: ModuleType, given: dict[str, Any], said: str
) -> None:
    nodes = animated(**given)
    found = converted(pack, nodes)
    assert found.prompt == nodes and said in found.left[0]


def test_a_clip_that_another_goes_on_from_is_left(pack: ModuleType) -> None:
    nodes = animated() | {"90": node("WanAnimateToVideo", video_frame_offset=["40", 5])}
    found = converted(pack, nodes)
    assert found.new == [] and "num_frames 0 is as long as the video" in found.left[0]


def driven(**frame: Any) -> Nodes:
    """ComfyUI's template of Animate 2: a SamplerCustom, and switches behind the decoder."""
    nodes = animated() | {
        "40": node(
            "WanAnimate2ToVideo", positive=["6", 0], negative=["7", 0], vae=["39", 0],
            reference_image=["70", 0], pose_video=["72", 0], clip_vision_output=["80", 0],
            width=["85", 0], height=["85", 1], length=81, batch_size=1, video_frame_offset=0,
            pose_strength=1.0, pose_start_percent=0.0, pose_end_percent=1.0,
            reference_image_strength=1.0, **frame,
        ),
        "85": node("GetImageSize", image=["72", 0]),
        "84": node("WanAnimate2Cache", model=["48", 0], device="gpu", dtype="int8"),
        "3": node(
            "SamplerCustom", model=["84", 0], positive=["40", 0], negative=["40", 1],
            sampler=["91", 0], sigmas=["92", 0], latent_image=["40", 2], add_noise=True,
            noise_seed=11, cfg=1.0,
        ),
        "91": node("KSamplerSelect", sampler_name="lcm"),
        "92": node("BasicScheduler", model=["84", 0], scheduler="simple", steps=10, denoise=1.0),
        "30": node("ImageFromBatch", image=["8", 0], batch_index=1, length=4096),
        "93": node("ComfySwitchNode", switch=False, on_false=["8", 0], on_true=["30", 0]),
        "94": node("BatchImagesNode", **{"images.image0": ["93", 0]}),
        "49": node("CreateVideo", images=["94", 0], audio=["72", 1], fps=["72", 2]),
    }  # fmt: skip
    return nodes


def test_animate_2_with_a_sampler_in_pieces(pack: ModuleType) -> None:
    found = converted(pack, driven())
    assert only(found, "WanControl") == {"video": ["72", 0], "reference": ["70", 0]}
    sampler = only(found, "WanGenerate")
    wanted = {
        "steps": 10, "guidance_scale": 1.0, "scheduler": "lcm", "seed": 11, "num_frames": 81,
        "width": ["85", 0], "fps": ["72", 2], "sigma_schedule": "simple", "flow_shift": 8.0,
    }  # fmt: skip
    assert {name: sampler[name] for name in wanted} == wanted
    assert only(found, "SaveVideo")["video"] == [found.new[-1], 1]
    kinds = {one["class_type"] for one in found.prompt.values()}
    assert not kinds & {"CreateVideo", "ComfySwitchNode", "ImageFromBatch", "BatchImagesNode"}
    (cache,) = found.left
    assert "WanAnimate2Cache" in cache and "the plan's choice" in cache


def test_animate_2_without_a_shift_has_the_one_of_its_model(pack: ModuleType) -> None:
    """In the template the scheduler's model comes without the ModelSamplingSD3 of the sampler's."""
    nodes = driven()
    nodes["84"]["inputs"]["model"] = ["36", 0]
    nodes["3"]["inputs"]["model"] = ["48", 0]
    nodes["48"]["inputs"]["model"] = ["84", 0]
    assert only(converted(pack, nodes), "WanGenerate")["flow_shift"] == 5.0


def test_of_animate_2_nothing_is_dropped_in_silence(pack: ModuleType) -> None:
    given = {"pose_end_percent": 0.7, "reference_image_strength": 0.5, "pose_strength": 0.8,
             "positive_pose": ["6", 0]}  # fmt: skip
    nodes = driven()
    nodes["40"]["inputs"] |= given
    nodes["92"]["inputs"]["denoise"] = 0.5
    found = converted(pack, nodes)
    assert only(found, "WanControl")["strength"] == 0.8
    left = "\n".join(found.left)
    for word in ("pose_end_percent 0.7", "reference_image_strength 0.5", "positive_pose", "den"):
        assert word in left
    nodes["91"] = node("SamplerEulerAncestral", eta=1.0)
    found = converted(pack, nodes)
    assert found.new == [] and any("not known here" in text for text in found.left)


def test_what_cannot_be_taken_over_is_said(pack: ModuleType) -> None:
    nodes = one_sampler(**{"47": node("CFGZeroStar", model=["36", 0])})
    nodes["48"]["inputs"]["model"] = ["47", 0]
    nodes["37"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    nodes["3"]["inputs"] |= {"sampler_name": "er_sde", "scheduler": "beta", "denoise": 0.5}
    left = "\n".join(converted(pack, nodes).left)
    for word in ("CFGZeroStar", "fp8_e4m3fn", "er_sde", "beta", "denoise 0.5"):
        assert word in left


def test_a_solver_of_several_steps_that_begins_anew_is_said(pack: ModuleType) -> None:
    nodes = two_samplers()
    for name in ("129:85", "129:86"):
        nodes[name]["inputs"]["sampler_name"] = "uni_pc"
    (left,) = converted(pack, nodes).left
    assert "begins unipc anew" in left


def test_other_samplers_stay_as_they_are(pack: ModuleType) -> None:
    prepared = node("WanSoundImageToVideo", width=640, height=640, length=77)
    image = node("EmptyLatentImage", width=512, height=512, batch_size=1)
    other = node("CLIPLoader", clip_name="t5", type="hunyuan_video")
    for changed, why in (
        ({"40": prepared}, "WanSoundImageToVideo prepares"),
        ({"40": image}, "do not come from a node of Wan"),
        ({"38": other}, "text encoder is not Wan's"),
    ):
        nodes = one_sampler(**changed)
        found = converted(pack, nodes)
        assert found.prompt == nodes and found.new == found.removed == []
        assert why in found.left[0]
    beside = one_sampler() | {f"x{k}": v for k, v in one_sampler(**{"40": image}).items()}
    for name in [name for name in beside if name.startswith("x")]:
        inputs = beside[name]["inputs"]
        inputs.update({k: ["x" + v[0], v[1]] for k, v in inputs.items() if isinstance(v, list)})
    found = converted(pack, beside)
    assert len(found.left) == 1 and "xKSampler" not in found.removed
    assert {n for n in found.prompt if n.startswith("x")} == {n for n in beside if n[0] == "x"}


def test_the_same_model_is_loaded_once(pack: ModuleType) -> None:
    nodes = one_sampler()
    again = {"s" + name: node(one["class_type"], **one["inputs"]) for name, one in nodes.items()
             if name in ("3", "8", "49", "50")}  # fmt: skip
    again["s8"]["inputs"]["samples"], again["s49"]["inputs"]["images"] = ["s3", 0], ["s8", 0]
    again["s50"]["inputs"]["video"] = ["s49", 0]
    kinds = [n["class_type"] for n in converted(pack, nodes | again).prompt.values()]
    assert kinds.count("WanLoader") == 1 and kinds.count("WanGenerate") == 2


def in_pieces(**changed: dict[str, Any]) -> Nodes:
    """The same clip by a SamplerCustomAdvanced, whose steps are given a shift of their own."""
    nodes = one_sampler(**{
        "60": node("ModelSamplingSD3", model=["37", 0], shift=3.0),
        "61": node("BasicScheduler", model=["60", 0], scheduler="simple", steps=12, denoise=1.0),
        "62": node("KSamplerSelect", sampler_name="euler"),
        "63": node("CFGGuider", model=["48", 0], positive=["6", 0], negative=["7", 0], cfg=4.0),
        "64": node("RandomNoise", noise_seed=21),
        "3": node("SamplerCustomAdvanced", noise=["64", 0], guider=["63", 0], sampler=["62", 0],
                  sigmas=["61", 0], latent_image=["40", 0]),
    })  # fmt: skip
    return nodes | changed


def test_a_sampler_in_pieces_is_read_where_each_piece_is(pack: ModuleType) -> None:
    found = converted(pack, in_pieces())
    sampler = only(found, "WanGenerate")
    wanted = {
        "steps": 12, "guidance_scale": 4.0, "scheduler": "euler", "seed": 21, "prompt": "a fox",
        "flow_shift": 3.0, "negative_prompt": "bad",
    }  # fmt: skip
    assert {name: sampler[name] for name in wanted} == wanted
    assert only(found, "WanLoRA")["lora"] == "a.sft" and found.left == []
    for name in ("60", "61", "62", "63", "64", "3"):
        assert name in found.removed


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"64": node("DisableNoise")}, "its noise comes from a node"),
        ({"63": node("DualCFGGuider", model=["48", 0])}, "its guider comes from a node"),
        ({"61": node("SplitSigmas")}, "its sigmas comes from a node"),
    ],
)
def test_a_sampler_with_strange_pieces_is_left(pack: ModuleType, changed: Nodes, why: str) -> None:
    found = converted(pack, in_pieces(**changed))
    assert found.new == [] and why in found.left[0]


def test_loras_and_loaders_of_packs(pack: ModuleType) -> None:
    rows = {
        "lora_1": {"on": True, "lora": "first.sft", "strength": 0.5},
        "lora_2": {"on": False, "lora": "off.sft", "strength": 1},
        "lora_3": {"on": True, "lora": "None", "strength": 1},
        "lora_4": {"on": True, "lora": "second.sft", "strength": -1, "strengthTwo": None},
    }
    nodes = one_sampler(**{
        "37": node("UnetLoaderGGUFAdvanced", unet_name="wan.gguf", dequant_dtype="default"),
        "38": node("CLIPLoaderMultiGPU", clip_name="umt5.gguf", type="wan", device="cuda:1"),
        "39": node("SomeVAE", path="elsewhere"),
        "35": node("Power Lora Loader (rgthree)", model=["37", 0], PowerLoraLoaderHeaderWidget={},
                   **rows),
        "34": node("LoraStacker", model=["35", 0], lora_name="more.sft"),
        "36": node("LoraLoaderModelOnly", model=["34", 0], lora_name="a.sft", strength_model=0),
    })  # fmt: skip
    found = converted(pack, nodes)
    loras = [n["inputs"] for n in found.prompt.values() if n["class_type"] == "WanLoRA"]
    assert [(one["lora"], one["strength"]) for one in loras] == [
        ("first.sft", 0.5), ("second.sft", -1.0),
    ]  # fmt: skip
    loader = only(found, "WanLoader")
    files = [loader[name] for name in ("model", "text_encoder", "vae")]
    assert files == ["wan.gguf", "umt5.gguf", "auto"]
    left = "\n".join(found.left)
    for said in ("UnetLoaderGGUFAdvanced", "put a Wan LoRA in", "VAE of node 39 (SomeVAE)"):
        assert said in left


def test_words_with_weights_stay_with_the_encoder_that_knows_them(pack: ModuleType) -> None:
    nodes = one_sampler()
    nodes["6"]["inputs"]["text"] = "a (red:1.3) fox"
    found = converted(pack, nodes)
    sampler = only(found, "WanGenerate")
    assert sampler["positive"] == ["6", 0] and sampler["negative"] == ["7", 0]
    assert only(found, "WanLoader")["text_encoder"] == "none" and "38" in found.prompt
    assert "weights the words in brackets" in found.left[0]
    nodes["6"]["inputs"]["text"] = "a fox :) and a line of a list 2)"
    assert only(converted(pack, nodes), "WanGenerate")["prompt"].startswith("a fox :)")


def patched(kind: str, **inputs: Any) -> Nodes:
    """One more node that the model passes on its way to the sampler."""
    nodes = one_sampler(**{"60": node(kind, **{"model": ["48", 0]} | inputs)})
    nodes["3"]["inputs"]["model"] = ["60", 0]
    return nodes


def sampled(kind: str = "KSampler", **inputs: Any) -> Nodes:
    nodes = one_sampler()
    nodes["3"] = node(kind, **nodes["3"]["inputs"] | inputs)
    return nodes


def texts(kind: str) -> Nodes:
    nodes = one_sampler(**{"60": node(kind, conditioning=["6", 0])})
    nodes["3"]["inputs"]["positive"] = ["60", 0]
    return nodes


def pictured(kind: str) -> Nodes:
    """The prompt passes one more node behind the one that hangs pictures on it."""
    frame = node("WanImageToVideo", positive=["6", 0], negative=["7", 0], start_image=["97", 0],
                 width=640, height=640, length=81)  # fmt: skip
    nodes = one_sampler(**{"97": node("LoadImage"), "80": frame})
    nodes["81"] = node(kind, conditioning=["80", 0])
    nodes["3"]["inputs"] |= {"positive": ["81", 0], "negative": ["80", 1],
                             "latent_image": ["80", 2]}  # fmt: skip
    return nodes


def two_encoders() -> Nodes:
    nodes = one_sampler(**{"60": node("CLIPLoader", clip_name="other.sft", type="wan")})
    nodes["7"]["inputs"]["clip"] = ["60", 0]
    return nodes


def latents_between() -> Nodes:
    nodes = two_samplers(between=node("LatentUpscale", samples=["129:86", 0]))
    nodes["129:86"]["inputs"]["return_with_leftover_noise"] = "enable"
    nodes["129:85"]["inputs"]["latent_image"] = ["between", 0]
    return nodes


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (patched("GetNode", model=None), "node 60 (GetNode), which names no model file"),
        (patched("ModelMergeSimple", model=None, model1=["48", 0]), "node 60 (ModelMergeSimple)"),
        (texts("ConditioningCombine"), "node 60 (ConditioningCombine); here one text holds"),
        (texts("ConditioningSetTimestepRange"), "one text holds for the whole clip"),
        (pictured("ConditioningConcat"), "node 81 (ConditioningConcat) and not from node 80"),
        (latents_between(), "ends at step 2 of 4, for another sampler to go on"),
        (one_sampler(**{"40": node("VAEEncode", vae=["39", 0])}), "video of a Wan Control"),
        (sampled("WanMoeKSampler", model_high_noise=["48", 0]), "WanMoeKSampler) is left as it"),
    ],
)  # fmt: skip
def test_what_would_not_run_or_be_another_clip_is_left(
    pack: ModuleType, nodes: Nodes, said: str
) -> None:
    found = converted(pack, nodes)
    assert found.new == [] and any(said in text for text in found.left), found.left


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (sampled(cfg=0.5), "cfg 0.5 of node 3 is as 1 here"),
        (two_encoders(), "text encoder other.sft is left out"),
        (patched("ContextWindowsManual"), "(ContextWindowsManual) is left out: a Wan Chunked"),
        (patched("EasyCache"), "(EasyCache) is left out: step_cache of a Wan Optimize"),
        (patched("WanVideoNAG"), "(WanVideoNAG) is left out: it changes a native model only"),
    ],
)
def test_what_is_lost_on_the_way_is_said(pack: ModuleType, nodes: Nodes, said: str) -> None:
    found = converted(pack, nodes)
    assert found.new and any(said in text for text in found.left), found.left


def test_constants_and_switches_of_packs_are_looked_through(pack: ModuleType) -> None:
    nodes = patched("Any Switch (rgthree)", model=None, any_01=["48", 0])
    nodes |= {"61": node("INTConstant", value=12), "62": node("easy float", value=2.5)}
    nodes["3"]["inputs"] |= {"steps": ["61", 0], "cfg": ["62", 0]}
    found = converted(pack, nodes)
    sampler = only(found, "WanGenerate")
    assert (sampler["steps"], sampler["guidance_scale"], found.left) == (12, 2.5, [])


HARMLESS = {
    ("CLIPLoader", "device"), ("LoraLoader", "strength_clip"),
    ("KSamplerAdvanced", "noise_seed"),  # of the second one, which adds no noise
    ("KSamplerAdvanced", "end_at_step"),  # of the second one, beyond the steps
    ("KSamplerAdvanced", "return_with_leftover_noise"),  # of the second one, which leaves none
}  # fmt: skip
"""Settings of nodes that go which change no clip."""


def other(value: Any) -> Any:
    """Return another value of the same kind."""
    choices = {"enable": "disable", "disable": "enable"}
    if isinstance(value, bool):
        return not value
    return choices.get(value, value + "x") if isinstance(value, str) else value + 4


@pytest.mark.parametrize("builder", ["one", "two", "vace", "in pieces", "move"])
def test_each_setting_of_a_node_that_goes_is_taken_over_or_spoken_of(
    pack: ModuleType, builder: str
) -> None:
    nodes = {"two": two_samplers, "in pieces": in_pieces}.get(builder, one_sampler)()
    size = {"width": 480, "height": 480, "length": 81, "batch_size": 1, "strength": 1.0}
    kind = {"vace": "WanVaceToVideo", "move": "WanMoveTrackToVideo"}.get(builder)
    if kind is not None:
        texts = {"positive": ["6", 0], "negative": ["7", 0], "vae": ["39", 0]}
        nodes["40"] = node(kind, **size, **texts)
        nodes["3"]["inputs"] |= {name: ["40", slot] for slot, name in
                                 enumerate(("positive", "negative", "latent_image"))}  # fmt: skip
    if builder == "in pieces":  # with one shift, not with one that the steps are not made by
        nodes["61"]["inputs"]["model"] = nodes.pop("60") and ["48", 0]
    for name, one in nodes.items():
        if one["class_type"] == "KSamplerAdvanced":
            left = "enable" if name == "129:86" else "disable"
            one["inputs"]["return_with_leftover_noise"] = left
    before = converted(pack, nodes)
    assert before.new and before.left == []
    for name in before.removed:
        for setting, value in nodes[name]["inputs"].items():
            asked = (nodes[name]["class_type"], setting)
            if isinstance(value, list) or asked in HARMLESS and name not in ("129:86", "3"):
                continue
            changed = {key: node(at["class_type"], **at["inputs"]) for key, at in nodes.items()}
            changed[name]["inputs"][setting] = other(value)
            after = converted(pack, changed)
            # A switch that is off has a side that nothing is taken of.
            unused = builder == "two" and name.endswith("0") and name != "129:90"
            assert (after.prompt, after.left) != (before.prompt, before.left) or unused, asked


def test_a_trim_of_the_users_own_stays(pack: ModuleType) -> None:
    nodes = one_sampler(**{"58": node("TrimVideoLatent", samples=["3", 0], trim_amount=2)})
    nodes["8"]["inputs"]["samples"] = ["58", 0]
    found = converted(pack, nodes)
    assert only(found, "TrimVideoLatent") == {"samples": [found.new[-1], 2], "trim_amount": 2}
    assert only(found, "VAEDecode")["samples"] == ["58", 0] and "49" in found.prompt


def test_the_image_encoder_s_own_picture_is_spoken_of(pack: ModuleType) -> None:
    nodes = animated()
    nodes["80"]["inputs"] |= {"image": ["99", 0], "crop": "none"}
    left = "\n".join(converted(pack, nodes | {"99": node("LoadImage")}).left)
    assert "what node 99 gives" in left and "squeezed" in left


@pytest.mark.parametrize("length", [1, 77, 78, 80, 81])
def test_a_clip_has_the_frames_that_comfyui_makes(pack: ModuleType, length: int) -> None:
    nodes = one_sampler()
    nodes["40"]["inputs"]["length"] = length
    latents = (length - 1) // 4 + 1  # as in EmptyHunyuanLatentVideo
    assert only(converted(pack, nodes), "WanGenerate")["num_frames"] == 4 * latents - 3


@pytest.mark.parametrize("sized", ["scaled", "measured", "typed"])
def test_a_picture_that_has_the_size_of_the_clip_is_not_cropped(
    pack: ModuleType, sized: str
) -> None:
    nodes = two_samplers(**{"70": node("ImageScale", image=["97", 0], width=640, height=640)})
    frame = nodes["129:98"]["inputs"]
    if sized == "measured":
        nodes["70"] = node("LoadImage")
        nodes["71"] = node("GetImageSize", image=["70", 0])
        frame |= {"width": ["71", 0], "height": ["71", 1]}
    if sized != "typed":
        frame["start_image"] = ["70", 0]
    found = converted(pack, nodes)
    new = [found.prompt[name]["class_type"] for name in found.new]
    assert ("ImageScale" in new) == (sized == "typed")


def test_pictures_and_latents_of_different_nodes_are_left(pack: ModuleType) -> None:
    """The prompt passes a node whose pictures the latents do not come with, or the reverse."""
    picture = node("WanImageToVideo", positive=["6", 0], negative=["7", 0], start_image=["97", 0],
                   width=640, height=640, length=81)  # fmt: skip
    nodes = one_sampler(**{"97": node("LoadImage"), "80": picture})
    nodes["3"]["inputs"]["positive"] = ["80", 0]
    found = converted(pack, nodes)
    assert found.new == [] and "one of them must give both" in found.left[0]
    nodes = one_sampler(**{"97": node("LoadImage"), "80": picture})
    nodes["3"]["inputs"]["latent_image"] = ["80", 2]
    found = converted(pack, nodes)
    assert found.new == [] and "whose pictures it needs" in found.left[0]
    assert len(found.left) == 2  # nothing else is said of a sampler that stays


@pytest.mark.parametrize(
    ("at", "name"), [("3", "cfg"), ("48", "shift")],
)  # fmt: skip
def test_a_zero_is_not_taken_for_the_models_own(pack: ModuleType, at: str, name: str) -> None:
    nodes = one_sampler()
    nodes[at]["inputs"][name] = 0.0
    found = converted(pack, nodes)
    assert found.new == [] and f"{name} of node {at} is 0" in found.left[0]


def test_samplers_that_are_not_known_are_named(pack: ModuleType) -> None:
    nodes = one_sampler(**{"90": node("WanVideoSampler", model=["91", 0], samples=["3", 0]),
                           "91": node("WanVideoModelLoader", model="wan.safetensors")})  # fmt: skip
    found = converted(pack, nodes)
    assert found.prompt["90"]["inputs"]["samples"] == [found.new[-1], 2]
    assert any("90 (WanVideoSampler) is left as it is" in text for text in found.left)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("floor(a * b) + 1", 81), ("max(4, (int(a) // 16) * 16)", 4), ("-a % 3", 1),
        ("a ** b", None), ("__import__('os')", None), ("a.real", None), ("open(a)", None),
        ("a / 0", None), ("c", None), ("(" * 5000, None), ("9" * 300, None), ("'x' * 9", None),
    ],
)  # fmt: skip
def test_arithmetic_is_numbers_and_nothing_else(
    pack: ModuleType, text: str, value: float | None
) -> None:
    assert part(pack, "nodes.native").arithmetic(text, {"a": 5.0, "b": 16.0}) == value


def test_circles_and_junk_are_answered(pack: ModuleType) -> None:
    answer = part(pack, "nodes.convert").answer
    round_about = one_sampler(**{
        "37": node("Reroute", x=["48", 0]), "36": node("Reroute", x=["37", 0]),
        "48": node("Reroute", x=["36", 0]),
    })  # fmt: skip
    looped = one_sampler()
    looped["3"]["inputs"]["latent_image"] = ["3", 0]
    patched = one_sampler(**{"47": node("Patch", model=["48", 0])})
    patched["48"]["inputs"]["model"] = ["47", 0]
    bare = {"3": node("KSampler"), "4": node("KSamplerAdvanced", latent_image=["5", 0])}
    for nodes in (round_about, looped, patched, bare):
        status, found = answer(json.dumps({"prompt": nodes}).encode())
        assert status == 200 and found["new"] == [] and found["left"]
    for body in (b"", b"[]", b"{}", b"{", b'{"prompt": {"1": 7}}', b'{"prompt": {"1": {}}}'):
        assert answer(body)[0] == 400


@pytest.mark.parametrize(
    ("expert", "changed", "said"),
    [
        ("second", {"end_at_step": 3}, "make those from 0 to 3"),
        ("second", {"steps": 30}, "steps 30 of node"),
        ("second", {"sampler_name": "dpmpp_2m"}, "sampler_name dpmpp_2m of node"),
        ("second", {"add_noise": "enable"}, "adds between the samplers"),
        ("first", {"start_at_step": 1}, "make those from 1 to"),
        ("first", {"add_noise": "disable"}, "takes its latents as they are"),
    ],
)
def test_no_setting_of_a_pair_is_dropped_in_silence(
    pack: ModuleType, expert: str, changed: dict[str, Any], said: str
) -> None:
    convert = part(pack, "nodes.convert")
    nodes = two_samplers()
    pair = [name for name, one in nodes.items() if one["class_type"] == "KSamplerAdvanced"]
    first, second = sorted(pair, key=lambda name: nodes[name]["inputs"]["latent_image"][0] in pair)
    before = convert.convert(part(pack, "nodes.native").Prompt(nodes))
    nodes[first if expert == "first" else second]["inputs"] |= changed
    after = convert.convert(part(pack, "nodes.native").Prompt(nodes))
    assert not any(said in text for text in before.left)
    assert any(said in text for text in after.left), after.left


def test_other_prompts_for_the_second_sampler_leave_both(pack: ModuleType) -> None:
    convert = part(pack, "nodes.convert")
    nodes = two_samplers(other=node("CLIPTextEncode", clip=["129:84", 0], text="a whale"))
    for one in nodes.values():
        if one["class_type"] == "KSamplerAdvanced" and one["inputs"]["add_noise"] == "disable":
            one["inputs"]["positive"] = ["other", 0]
    found = convert.convert(part(pack, "nodes.native").Prompt(nodes))
    assert found.new == [] and any("whose pictures it needs" in text for text in found.left)


def test_shared_values_are_computed_once_and_circles_end(pack: ModuleType) -> None:
    """Forty levels that each take the one below twice; and one that takes itself twice."""
    prompt = part(pack, "nodes.native").Prompt
    nodes: Nodes = {"0": node("PrimitiveInt", value=1)}
    for level in range(1, 41):
        below = [str(level - 1), 0 if level == 1 else 1]
        nodes[str(level)] = node(
            "ComfyMathExpression", expression="a + b", **{"values.a": below, "values.b": below}
        )
    nodes["user"] = node("KSampler", steps=["40", 1])
    around = ["around", 1]
    nodes["around"] = node(
        "ComfyMathExpression", expression="a + b", **{"values.a": around, "values.b": around}
    )
    nodes["lost"] = node("KSampler", steps=around)
    read = prompt(nodes)
    assert read.value("user", "steps") == 2**40
    assert read.value("lost", "steps") is None
    assert len(read.users("39")) == 2 and read.users("user") == []
