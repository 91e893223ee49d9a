"""RaceCoreAttention: RACE Attention in the core_attention slot of Megatron's self-attention."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from race_dist.hashing import sample_planes
from race_dist.integrations.megatron.config import require_race_config
from race_dist.integrations.megatron.context import SequenceShard, check_causal_mask, combine_masks, is_causal, padding_mask
from race_dist.integrations.megatron.heads import HeadModule
from race_dist.nn.decay import decay_time_constants
from race_dist.nn.initialization import seeded_normal
from race_dist.nn.norm import compute_dtype, rms
from race_dist.nn.race_core import apply_qk_norm, attend
from race_dist.nn.sequence import Sequence
from race_dist.nn.short_conv import short_conv
from race_dist.nn.tail_carry import SpanWithTail, run_with_tail


class RaceCoreAttention(HeadModule):
    """From queries, keys and values to each head's output, over the tensor-parallel rank's heads and the context-parallel
    rank's tokens.

    It has what RACE adds between the projections: short convolution, length and sharpness per head, hyperplanes, decay
    ("token" needs the layer's input: :class:`race_dist.integrations.megatron.RaceSelfAttention` passes it), output norm.
    Hyperplanes that are not trained are no part of a checkpoint but for what they are drawn from (``planes_of``), and
    stay float32 whatever the model is cast to.

    Args:
        config: a RaceTransformerConfig.
        layer_number: from 1, of the whole model.
        attn_mask_type: causal, padding_causal, no_mask or padding.
        attention_type: "self".
        attention_dropout: None or 0.
        softmax_scale: None.
        cp_comm_type: not looked at: only sketches are exchanged.
        pg_collection: with tp and cp; None takes parallel_state's.

    Raises:
        TypeError: the config has no race_* fields.
        ValueError: an argument asks for what RACE does not have.
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
        self._mask_seen = False
        self._build_parameters()
        self._build_constants()

    def _build_parameters(self) -> None:
        race, heads, groups = self.race, int(self.config.num_attention_heads), self.config.race_query_groups
        if race.short_conv:
            convolved = [("q_conv", heads, self.add_parameter), ("k_conv", groups, self.add_kv_parameter)]
            convolved += [("v_conv", groups, self.add_kv_parameter)] if race.conv_values else []
            for name, count, add in convolved:
                add(
                    name,
                    seeded_normal(
                        (race.short_conv, count * race.resolved_head_dim),
                        0.5 * race.short_conv**-0.5,
                        race.seed,
                        f"race.{self.layer}.{name}.weight",
                    ),
                    dim=1,
                )
        if race.qk_norm:
            self.add_parameter("q_scale", torch.ones(heads, 1))
            self.add_kv_parameter("k_scale", torch.ones(groups, 1))
        if race.train_beta:
            self.add_kv_parameter("log_beta", self._betas().log())
        if race.train_planes:
            planes = sample_planes(
                race.num_tables,
                race.num_planes,
                race.resolved_head_dim,
                seed=race.seed,
                layer=self.layer,
                num_heads=None if race.share_planes else groups,
            )
            if race.share_planes:
                self.add_parameter("planes", planes, divided=False)
            else:
                self.add_kv_parameter("planes", planes)
        if race.normalization == "none":
            self.add_parameter("out_norm", torch.ones(heads, race.resolved_head_dim))

    def _betas(self) -> Tensor:
        """``[groups]`` sharpness at the start, of all heads."""
        return torch.tensor(self.race.beta_init, dtype=torch.float64).expand(self.config.race_query_groups).clone()

    def _build_constants(self) -> None:
        """What the config says: made anew whenever the module moves or changes its dtype, never rounded."""
        where = self._where()
        for name, value in self._constants(torch.empty(0, **where)).items():
            self.register_buffer(name, value, persistent=False)
        if not self.race.train_planes:
            self.register_buffer("planes_of", torch.tensor(self._origin(), dtype=torch.int64, device=where["device"]))

    def _origin(self) -> list[int]:
        """What the hyperplanes are drawn from."""
        return [self.race.seed, self.layer, self.race.num_tables, self.race.num_planes, int(self.race.share_planes)]

    def _constants(self, like: Tensor) -> dict[str, Tensor]:
        race, share = self.race, self.share
        where: dict[str, Any] = {"device": like.device, "dtype": compute_dtype(like)}
        own = slice(share.first_kv_head, share.first_kv_head + share.kv_heads)
        constants = {}
        if not race.train_planes:
            constants["planes"] = sample_planes(
                race.num_tables,
                race.num_planes,
                race.resolved_head_dim,
                seed=race.seed,
                layer=self.layer,
                num_heads=None if race.share_planes else share.kv_heads,
                head_offset=0 if race.share_planes else share.first_kv_head,
            ).to(**where)
        if not race.train_beta:
            constants["beta"] = self._betas()[own].to(**where)
        if race.decay == "multiscale":
            rates = [-1 / n for n in decay_time_constants(self.config.race_query_groups)]
            constants["log_decay"] = torch.tensor(rates[own], dtype=torch.float64).to(**where)
        return constants

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        like = next((t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), None)
        if like is not None:
            for name, value in self._constants(like).items():
                self._buffers[name] = value
        return self

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
        loaded, own = state_dict.get(prefix + "planes_of"), self._origin()  # dist_checkpointing has written the buffer already
        if loaded is not None and "planes_of" in self._buffers and loaded.tolist() != own:
            names = ("race_seed", "layer", "race_num_tables", "race_num_planes", "race_share_planes")
            differ = [
                f"{name} {there} there and {here} here"
                for name, there, here in zip(names, loaded.tolist(), own, strict=True)
                if there != here
            ]
            error_msgs.append(
                f"{prefix.removesuffix('.')}: the checkpoint's weights were trained with other hyperplanes: "
                + ", ".join(differ)
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

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
            attention_mask: None, the plain causal mask, or ``[b, 1, 1, s]`` bool whose True says that a token is padding
                (padding types): it is absent, so nothing is added to the sketch, decayed or convolved there.
            attn_mask_type: None is the layer's own.
            attention_bias: with race_decay = "token" the log decays ``[s, b, groups]``, at most 0; else None. They are a
                bias in Megatron's sense, ``sum of log_decay over j < i' <= i`` on the similarity of i and j, given by
                token.
            packed_seq_params: documents and, under dynamic context parallelism, the group of this call.

        Returns:
            ``[s, b, heads * d]`` or ``[t, heads * d]``.

        Raises:
            ValueError: a mask or an argument that RACE has no room for; the message says why.
        """
        mask_type = attn_mask_type or self.attn_mask_type
        thd = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if key.shape[0] != query.shape[0] or is_causal(mask_type) != self.race.causal:
            raise ValueError(
                f"{query.shape[0]} queries came with {key.shape[0]} keys and attn_mask_type {mask_type.name}, as "
                "in decoding with cached keys; a RACE layer decodes from a sketch, which Megatron does not keep"
            )
        q, k, v = (x[None] if thd else x.transpose(0, 1) for x in (query, key, value))
        rows = SequenceShard.of(q.shape[1], packed_seq_params, self.cp_group, self.config.layout, q.device)
        key_mask = combine_masks(rows.key_mask, padding_mask(attention_mask, mask_type, *q.shape[:2]))
        self._look_at_mask(attention_mask, mask_type, rows)
        sequence = rows.sequence(key_mask, q.device)
        if self.race.short_conv:
            q, k, v = self._convolve(q, k, v, sequence)
        if self.race.qk_norm:
            eps = self.race.norm_eps
            q, k = apply_qk_norm(q, self.q_scale, eps), apply_qk_norm(k, self.of_own_kv_heads("k_scale"), eps)
        out, _ = attend(
            self.race,
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            self._planes(),
            self._beta(v),
            self._decay(attention_bias, thd),
            None,
            sequence,
        )
        if self.race.normalization == "none":
            out = (rms(out, self.race.norm_eps) * self.out_norm.to(compute_dtype(out))).to(out.dtype)
        return out[0].flatten(1) if thd else out.transpose(0, 1).flatten(2)

    def _look_at_mask(self, mask: Tensor | None, mask_type: AttnMaskType, rows: SequenceShard) -> None:
        """Check a causal mask's values: on the CPU always, on a device once (it waits, and no graph could hold it)."""
        if mask is None or mask_type != AttnMaskType.causal:
            return
        if mask.device.type == "cpu" or not (self._mask_seen or torch.cuda.is_current_stream_capturing()):
            check_causal_mask(mask, rows)
            self._mask_seen = True

    def _convolve(self, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (and values, where the config says so), each plus its short convolution over tokens that are not
        padding."""
        convs = [self.q_conv, self.of_own_kv_heads("k_conv", dim=1)]
        convs += [self.of_own_kv_heads("v_conv", dim=1)] if self.race.conv_values else []
        tensors = (q, k, v)
        flat = tuple(x.flatten(2) for x in tensors[: len(convs)])

        def taps(piece: SpanWithTail) -> tuple[Tensor, ...]:
            return tuple(short_conv(part, taps, piece.documents) for part, taps in zip(piece.tensors, convs, strict=True))

        more, _ = run_with_tail(flat, self.race.short_conv - 1, None, sequence, taps)
        added = [x + part.view_as(x) for x, part in zip(tensors, more)]
        return added[0], added[1], added[2] if self.race.conv_values else v

    def _planes(self) -> Tensor:
        if self.race.train_planes:
            return self.summed_over_ranks(self.planes) if self.race.share_planes else self.of_own_kv_heads("planes")
        planes: Tensor = self.planes
        return planes

    def _beta(self, v: Tensor) -> Tensor:
        """``[groups]``."""
        if self.race.train_beta:
            return self.of_own_kv_heads("log_beta").to(compute_dtype(v)).exp()
        beta: Tensor = self.beta
        return beta

    def _decay(self, bias: Tensor | None, thd: bool) -> Tensor | None:
        """``[groups]``, ``[B, T, groups]`` or None."""
        if self.race.decay != "token":
            if bias is not None:
                raise ValueError("attention_bias came to a RACE layer, which has no logits to add it to: leave it out")
            return self.log_decay if self.race.decay == "multiscale" else None
        if bias is None:
            raise ValueError(
                'race_decay is "token": the decay is computed from the layer\'s input, which core_attention is '
                'not given. Build the layer with get_race_layer_spec, or set race_decay to "multiscale" or '
                '"none"'
            )
        return bias.view(1, -1, bias.shape[-1]) if thd else bias.transpose(0, 1)
