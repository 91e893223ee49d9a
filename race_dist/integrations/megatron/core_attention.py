"""RaceCoreAttention: RACE Attention in the core_attention slot of Megatron's self-attention."""

from __future__ import annotations

import re
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from race_dist.integrations.megatron.config import require_race_config
from race_dist.integrations.megatron.masks import check_causal_mask, combine_masks, is_causal, padding_mask
from race_dist.integrations.megatron.sequence_shard import SequenceShard
from race_dist.integrations.megatron.tensor_parallel import HeadModule
from race_dist.nn import RaceCore

PLANES_ORIGIN = ("race_seed", "layer", "race_num_tables", "race_num_planes", "race_share_planes")


class RaceCoreAttention(HeadModule):
    """Attention of the heads of this tensor-parallel rank over the tokens of this context-parallel rank.

    It translates Megatron's call to :class:`race_dist.nn.RaceCore`, the layer that all models of this package use: short
    convolution, query and key norm, hash, decay, attention and output norm. (``race_decay = "token"`` needs the layer's input:
    :class:`race_dist.integrations.megatron.RaceSelfAttention` computes the decay and passes it.) Hyperplanes that are not
    trained stay float32 whatever the model is cast to. A checkpoint does not contain them; it records what they are drawn from
    in ``planes_of``.

    Args:
        config: a RaceTransformerConfig.
        layer_number: index of the layer in the whole model, from 1.
        attn_mask_type: causal, padding_causal, no_mask or padding.
        attention_type: "self".
        attention_dropout: None or 0.
        softmax_scale: None.
        cp_comm_type: ignored: context-parallel ranks exchange sketches only.
        pg_collection: process groups, with tp and cp; None: those of parallel_state.

    Attributes:
        core: the RaceCore of this rank's heads. Its parameters have flat names in the state dict: see :func:`state_dict_name`.

    Raises:
        TypeError: the config has no race_* fields.
        ValueError: an argument requests what RACE layers do not support.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        config = require_race_config(config, "RaceCoreAttention")
        if attention_type != "self":
            raise ValueError(f"attention_type is {attention_type!r}, but RACE layers attend to their own sequence only")
        if attention_dropout:
            raise ValueError(f"attention_dropout is {attention_dropout}, but a RACE layer has no attention weights to drop")
        if softmax_scale is not None:
            raise ValueError(
                f"softmax_scale is {softmax_scale}, but there are no logits to scale: the sharpness is race_beta_init"
            )
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        super().__init__(config, pg_collection.tp)
        self.cp_group, self.layer, self.attn_mask_type = pg_collection.cp, layer_number - 1, attn_mask_type
        self.race = config.race(causal=is_causal(attn_mask_type))
        self.core = RaceCore(self.race, self.layer, partition=self.heads, short_conv=True, **self.factory_kwargs())
        sharded = self.heads.mark(dict(self.core.named_parameters()), self.core.head_axes())
        self.sharded_dims = {state_dict_name(f"core.{name}"): dim for name, dim in sharded.items()}
        if not self.race.train_planes:
            origin = torch.tensor(self._planes_origin(), dtype=torch.int64, device=self.factory_kwargs()["device"])
            self.register_buffer("planes_of", origin)
        self.register_state_dict_post_hook(_flatten_names)
        self.register_load_state_dict_pre_hook(_nest_names)
        self._mask_was_checked = False

    # --- checkpoints -------------------------------------------------------------------------------------------------------

    def _planes_origin(self) -> list[int]:
        """The values that determine the hyperplanes, in the order of :data:`PLANES_ORIGIN`."""
        race = self.race
        return [race.seed, self.layer, race.num_tables, race.num_planes, int(race.share_planes)]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # The buffer cannot be compared: dist_checkpointing has already loaded into it.
        loaded, own = state_dict.get(prefix + "planes_of"), self._planes_origin()
        if loaded is not None and "planes_of" in self._buffers and loaded.tolist() != own:
            differences = [
                f"{name} {stored} there and {here} here"
                for name, stored, here in zip(PLANES_ORIGIN, loaded.tolist(), own, strict=True)
                if stored != here
            ]
            error_msgs.append(
                f"{prefix.removesuffix('.')}: the checkpoint's weights were trained with other hyperplanes: "
                + ", ".join(differences)
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    # --- forward -----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """The attention over this rank's heads and tokens.

        Args:
            query: ``[s, b, heads, d]``, or ``[t, heads, d]`` with packed documents (THD).
            key, value: ``[s, b, groups, d]`` or ``[t, groups, d]``.
            attention_mask: None, the plain causal mask, or (with the padding types) ``[b, 1, 1, s]`` bool, True for padding. A
                padding token is absent: it is not added to the sketch, causes no decay and is seen by no convolution.
            attn_mask_type: None: the type of the layer.
            attention_bias: with ``race_decay = "token"`` the log decays ``[s, b, groups]``, at most 0; else None. They are a
                bias in Megatron's sense, given per token: the similarity of tokens i and j gets the sum of the log decays over
                ``j < i' <= i``.
            packed_seq_params: packed documents and, under dynamic context parallelism, the group of this call.

        Returns:
            ``[s, b, heads * d]`` or ``[t, heads * d]``.

        Raises:
            ValueError: a mask or an argument that RACE layers do not support; the message gives the reason.
        """
        mask_type = attn_mask_type or self.attn_mask_type
        thd = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if key.shape[0] != query.shape[0] or is_causal(mask_type) != self.race.causal:
            raise ValueError(
                f"{query.shape[0]} queries came with {key.shape[0]} keys and attn_mask_type {mask_type.name}, as "
                "in decoding with cached keys; a RACE layer decodes from a sketch, which Megatron does not keep"
            )
        q, k, v = (x[None] if thd else x.transpose(0, 1) for x in (query, key, value))  # [B, T, H, D]
        shard = SequenceShard.of(q.shape[1], packed_seq_params, self.cp_group, self.config.layout, q.device)
        key_mask = combine_masks(shard.key_mask, padding_mask(attention_mask, mask_type, *q.shape[:2]))
        self._check_causal_mask(attention_mask, mask_type, shard)
        sequence = shard.sequence(key_mask, q.device)
        (q, k, v), _ = self.core.convolve(q, k, v, None, sequence)
        out, _ = self.core(q, k, v, None, sequence, log_decay=self._token_decay(attention_bias, thd))
        return out[0].flatten(1) if thd else out.transpose(0, 1).flatten(2)

    def _check_causal_mask(self, mask: Tensor | None, mask_type: AttnMaskType, shard: SequenceShard) -> None:
        """Check the values of a causal mask: on the CPU in every call, on a device once, because the check synchronizes."""
        if mask is None or mask_type != AttnMaskType.causal:
            return
        if mask.device.type == "cpu" or not (self._mask_was_checked or torch.cuda.is_current_stream_capturing()):
            check_causal_mask(mask, shard)
            self._mask_was_checked = True

    def _token_decay(self, bias: Tensor | None, thd: bool) -> Tensor | None:
        """The log decays ``[B, T, groups]``, or None without decay per token."""
        if self.race.decay != "token":
            if bias is not None:
                raise ValueError("attention_bias came to a RACE layer, which has no logits to add it to: leave it out")
            return None
        if bias is None:
            raise ValueError(
                'race_decay is "token": the decay is computed from the layer\'s input, which core_attention does '
                'not get. Build the layer with get_race_layer_spec, or set race_decay to "multiscale" or "none"'
            )
        return bias.view(1, -1, bias.shape[-1]) if thd else bias.transpose(0, 1)


# --- names in the state dict -----------------------------------------------------------------------------------------------

_NESTED_NAME = re.compile(r"^(|(?:.*\.)?core_attention\.)core\.(\w+?)(?:\.weight)?$")


def state_dict_name(parameter: str) -> str:
    """The name in the state dict and in checkpoints of a parameter of a model, a layer or a RaceCoreAttention.

    Parameters of the core are flat there: ``core_attention.core.q_conv.weight`` is ``core_attention.q_conv``.
    """
    return _NESTED_NAME.sub(r"\1\2", parameter)


def _flatten_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """A state-dict hook: rename the parameters of the core as :func:`state_dict_name` says."""
    for name in _core_names(module):
        state_dict[prefix + state_dict_name(name)] = state_dict.pop(prefix + name)


def _nest_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The inverse of :func:`_flatten_names`, before a state dict is loaded."""
    for name in _core_names(module):
        if (flat := prefix + state_dict_name(name)) in state_dict:
            state_dict[prefix + name] = state_dict.pop(flat)


def _core_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters() if name.startswith("core.")]
