"""What is known of families of pipelines: a table. Another family is another row.

``auto`` takes the row whose pipelines a folder is of; where none is, what the pipeline's own signature says.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from typing import Any, Final

AUTO: Final = "auto"
#: The model that comes with the package, by the name settings have for it.
BUNDLED: Final = "bundled"
PICTURE, VIDEO = "picture", "video"


@dataclass(frozen=True)
class Backend:
    """A family of pipelines.

    Args:
        name: as ``--backend`` has it.
        pipelines: classes of diffusers that a folder may be of.
        model: what is drawn with where no model is given.
        kind: ``"picture"`` or ``"video"``.
        size: width and height, pixels; None leaves them to the pipeline.
        steps: of denoising.
        guidance: the scale.
        guided_by: the pipeline's name for the scale.
        negative: the negative prompt; None for none.
        frames: of a video.
        fps: frames a second of the file.
        edits: whether pictures are given. They are drawn one at a time.
        prompt: the pipeline's name for the prompt.
        dtype: what it runs in where that is not said; ``"auto"`` is what the weights are stored in.
    """

    name: str
    pipelines: tuple[str, ...] = ()
    model: str | None = None
    kind: str = PICTURE
    size: tuple[int, int] | None = None
    steps: int = 50
    guidance: float | None = None
    guided_by: str = "guidance_scale"
    negative: str | None = None
    frames: int | None = None
    fps: int = 16
    edits: bool = False
    prompt: str = "prompt"
    dtype: str = "auto"

    @property
    def variable(self) -> str:
        """The environment variable that says where the model is."""
        return f"HICACHE_MODEL_PATH_{self.name.upper().replace('-', '_')}"


def _video(name: str, *pipelines: str, **settings: Any) -> Backend:
    return Backend(name, pipelines, kind=VIDEO, **settings)


_ROWS: Final = (
    Backend("shapes", ("ShapesPipeline",), BUNDLED, guidance=4.0, dtype="fp32"),
    Backend("flux", ("FluxPipeline",), "black-forest-labs/FLUX.1-dev", size=(1024, 1024), guidance=3.5),
    Backend(
        "flux-kontext",
        ("FluxKontextPipeline",),
        "black-forest-labs/FLUX.1-Kontext-dev",
        size=(1024, 1024),
        steps=28,
        guidance=2.5,
        edits=True,
    ),
    Backend(
        "qwen-image",
        ("QwenImagePipeline",),
        "Qwen/Qwen-Image",
        size=(1328, 1328),
        guidance=4.0,
        guided_by="true_cfg_scale",
        negative=" ",
    ),
    Backend(
        "qwen-image-edit",
        ("QwenImageEditPlusPipeline", "QwenImageEditPipeline"),
        "Qwen/Qwen-Image-Edit-2509",
        guidance=4.0,
        guided_by="true_cfg_scale",
        negative=" ",
        edits=True,
    ),
    Backend(
        "sd3",
        ("StableDiffusion3Pipeline",),
        "stabilityai/stable-diffusion-3.5-large",
        size=(1024, 1024),
        guidance=4.5,
    ),
    _video(
        "hunyuan-video",
        "HunyuanVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        model="hunyuanvideo-community/HunyuanVideo",
        size=(1280, 720),
        guidance=6.0,
        frames=129,
        fps=24,
    ),
    _video(
        "wan",
        "WanPipeline",
        "WanImageToVideoPipeline",
        model="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        size=(832, 480),
        guidance=5.0,
        frames=81,
    ),
    _video(
        "ltx",
        "LTXPipeline",
        "LTXImageToVideoPipeline",
        model="Lightricks/LTX-Video",
        size=(704, 512),
        guidance=3.0,
        frames=161,
        fps=24,
    ),
    _video(
        "cogvideox",
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        model="THUDM/CogVideoX-5b",
        size=(720, 480),
        guidance=6.0,
        frames=49,
        fps=8,
    ),
    Backend("dit", ("DiTPipeline",), "facebook/DiT-XL-2-256", guidance=4.0, prompt="class_labels"),
)
#: By name. ``auto`` is none of them: it finds one.
BACKENDS: Final[dict[str, Backend]] = {row.name: row for row in _ROWS}
#: Variables of the authors' launcher that are read where ours are not set.
_THEIR_VARIABLES: Final = {"qwen-image": "QWEN_IMAGE_MODEL_PATH"}


def named(name: str) -> Backend | None:
    """The family of a name; None for ``auto``.

    Raises:
        ValueError: no such family.
    """
    if name == AUTO:
        return None
    if name not in BACKENDS:
        raise ValueError(f"--backend: expected one of {', '.join((*BACKENDS, AUTO))}, got {name!r}")
    return BACKENDS[name]


def of_pipeline(kind: str) -> Backend | None:
    """The family that a class of pipelines is of, where one is."""
    return next((row for row in _ROWS if kind in row.pipelines), None)


def model_of(model: str | None, backend: Backend | None) -> str:
    """What is drawn with: as given, or as the environment says, or the family's usual one.

    Raises:
        ValueError: none of them says.
    """
    if model is not None:
        return model
    if backend is None:
        return BUNDLED
    variables = (backend.variable, _THEIR_VARIABLES.get(backend.name, ""))
    found = next((os.environ[name] for name in variables if os.environ.get(name)), backend.model)
    if found is None:
        raise ValueError(f"--model: expected a folder or a name: --backend {backend.name} has no usual one")
    return found


def by_signature(kind: str, call: inspect.Signature) -> Backend:
    """A family for a pipeline that the table does not have: what its own call takes, and its own defaults.

    Args:
        kind: the pipeline's class.
        call: the signature of its ``__call__``.
    """
    names = call.parameters
    steps = names["num_inference_steps"].default if "num_inference_steps" in names else 50
    return Backend(
        kind,
        (kind,),
        kind=VIDEO if "num_frames" in names else PICTURE,
        steps=steps if isinstance(steps, int) else 50,
        guided_by="guidance_scale" if "guidance_scale" in names else "true_cfg_scale",
        edits="image" in names and names["image"].default is inspect.Parameter.empty,
    )
