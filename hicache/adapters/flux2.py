"""FLUX.2: all blocks of a kind share their gates, so three features whatever the depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache.adapters import given_pictures
from hicache.adapters.base import ModuleAdapter, ModuleOutput, packed

# given pictures are at times 10, 20, …; with kv_cache_mode they come first, and once
_BY_IDS: Final = given_pictures.ByIds(lambda times: times >= 10)


class Flux2(ModuleAdapter):
    """Attentions of the doubles, their MLPs, and the singles' fused outputs, each kind added up.

    Args:
        module: the transformer.
        collapse: False makes every output a feature of its own: the same sum, for comparison.
    """

    edits = True
    drawn_arguments = ("img_ids",)

    def __init__(self, module: nn.Module, collapse: bool = True) -> None:
        super().__init__(module)
        self.collapse = collapse
        self._doubles = list(self.module.transformer_blocks)
        self._singles = list(self.module.single_transformer_blocks)
        self._single: Tensor | None = None  # modulation of the singles, [batch, …, 3 · channels]

    def outputs(self) -> Sequence[ModuleOutput]:
        found: list[ModuleOutput] = []
        for index, block in enumerate(self._doubles):
            attention, mlp = (0, 1) if self.collapse else (2 * index, 2 * index + 1)
            found.append(ModuleOutput(block.attn, ((attention, None),), element=0))
            found.append(ModuleOutput(block.ff, ((mlp, None),)))
        for index, block in enumerate(self._singles):
            feature = 2 if self.collapse else 2 * len(self._doubles) + index
            found.append(ModuleOutput(block.attn, ((feature, None),), joint="last"))
        return found

    def hooks(self) -> list[Callable[[], None]]:
        def keep(layer: nn.Module, args: Any, output: Tensor) -> None:
            self._single = output

        def forget() -> None:
            self._single = None

        return [self.module.single_stream_modulation.register_forward_hook(keep).remove, forget]

    def gates(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        assert self._single is not None
        double = block_kwargs["temb_mod_img"].reshape(-1, 6, base.shape[-1])  # [1 or batch, 6, channels]
        single = self._single.reshape(-1, 3, base.shape[-1])
        kinds = torch.cat([double[:, 2::3], single[:, 2:]], dim=1)  # [1 or batch, 3, channels]
        gates = kinds.to(base.dtype).transpose(0, 1).expand(-1, len(base), -1)
        if not self.collapse:
            attention_and_mlp = gates[:2].repeat(len(self._doubles), 1, 1)
            gates = torch.cat([attention_and_mlp, gates[2:].repeat(len(self._singles), 1, 1)])
        return gates[: self.num_features(block_kwargs)].contiguous()

    def drawn(self, model_kwargs: Mapping[str, Any], tokens: int) -> range:
        return _BY_IDS(model_kwargs.get("img_ids"), tokens)

    def refusal(self, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> str | None:
        if block_kwargs["temb_mod_img"].numel() // (6 * self.module.inner_dim) not in (
            1,
            len(block_kwargs["hidden_states"]),
        ):
            return "its gates differ between the picture drawn and the pictures given (kv_cache_mode)"
        return None

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        config = self.module.config
        guided = getattr(config, "guidance_embeds", True)
        return {
            "hidden_states": like.new_empty(batch, packed(latents), config.in_channels),
            "timestep": like.new_empty(batch),
            "guidance": like.new_empty(batch, dtype=torch.float32) if guided else None,
            "encoder_hidden_states": like.new_empty(batch, text, config.joint_attention_dim),
            "txt_ids": like.new_empty(batch, text, 4, dtype=torch.int64),
            "img_ids": like.new_empty(batch, packed(latents), 4, dtype=torch.int64),
        }

    def tokens(self, latent_shape: Sequence[int]) -> int:
        return packed(latent_shape)
