"""The forward pass of Llama-like models as a function of their parameters, with a static cache and shared prompts.

It computes what the modules of `transformers` compute, to rounding, and in less time: every prompt is read once for all
its responses, and no more logits are held at a time than `CHUNK`. What it does not reproduce is not `supported`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nlhf.llm.shards import Gathered, full, is_sharded

Weights: TypeAlias = Mapping[str, Tensor]
Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries, keys, values), each (tokens, heads, size), to (tokens, heads, size) or a view of it."""

CHUNK = 2**23
"""Most logits held at a time while scoring: 32 MB."""
_KNOWN = re.compile(
    r"(model\.(embed_tokens|norm)|lm_head)\.weight|model\.layers\.\d+\.((input|post_attention)_layernorm\.weight"
    r"|(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.(weight|bias|lora_[AB]\.default\.weight))"
)


def supported(network: nn.Module) -> bool:
    """Whether `Llama` reproduces the network: not with sliding windows, experts, caps, more norms, other adapters."""
    config: Any = getattr(network, "config", None)
    if getattr(config, "model_type", None) not in ("llama", "mistral", "qwen2"):
        return False
    adapters: Any = getattr(network, "peft_config", {})
    rope = config.rope_parameters  # the kinds that are left out change with the length of the text
    return (
        config.hidden_act == "silu"
        and getattr(config, "sliding_window", None) is None
        and rope["rope_type"] in ("default", "linear", "llama3", "yarn")
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and all(_KNOWN.fullmatch(name) for name in _named(dict(network.named_parameters())))
        and all(p.dtype in (torch.float32, torch.bfloat16) for p in network.parameters())
        and list(adapters) in ([], ["default"])
        and not any(one.rank_pattern or one.alpha_pattern or one.fan_in_fan_out for one in adapters.values())
        and not any(getattr(module, "merged", False) for module in network.modules())
    )


@dataclass
class Cache:
    """Keys and values of rows, with room for all their tokens; `Llama.decode` fills it in place."""

    weights: Weights
    states: Tensor
    """(layers, 2, rows, heads, room, size)"""
    bias: Tensor | None
    """(rows, 1, 1, room), -inf at the padding; None where there is none."""
    positions: Tensor
    """(rows,) of the next token, among those that are not padding."""
    used: int

    def keep(self, rows: Tensor) -> Cache:
        """These rows only: the others have ended."""
        bias = self.bias if self.bias is None else self.bias[rows]
        return Cache(self.weights, self.states.index_select(2, rows), bias, self.positions[rows], self.used)


@dataclass(frozen=True, eq=False)
class Llama:
    """What a network computes from any parameters of its shape, by name. Nothing is kept of its own parameters.

    Shapes: B prompts (B, L) with a mask that is 0 at their padding, on the left; n responses of each, T tokens.
    """

    layers: int
    heads: int
    """Of keys and values."""
    size: int
    """Of a head."""
    eps: float
    frequencies: Tensor
    """(size / 2,) radians per position."""
    amplitude: float = 1.0
    """Of the rotations."""
    scale: float = 0.0
    """Of the adapters."""

    @classmethod
    def of(cls, network: Any) -> Llama:
        """The shape of a network that is `supported`."""
        config, rope = network.config, next(m for m in network.modules() if hasattr(m, "inv_freq"))
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads, frequencies, amplitude = config.num_key_value_heads, rope.inv_freq.float(), rope.attention_scaling
        adapters = getattr(network, "peft_config", {}).values()
        scale = sum(one.lora_alpha / (one.r**0.5 if one.use_rslora else one.r) for one in adapters)
        return cls(config.num_hidden_layers, heads, size, config.rms_norm_eps, frequencies, amplitude, scale)

    @torch.no_grad()
    def prefill(self, params: Weights, tokens: Tensor, mask: Tensor, n: int, room: int) -> tuple[Tensor, Cache]:
        """(B n, V) logits of the first token, and the cache of prompts and `room` more tokens; n rows adjacent.

        The cache holds all parameters, gathered: to gather them for every token would take longer than the rest.
        """
        w, (B, L), bias = {k: full(p) for k, p in _named(params).items()}, tokens.shape, None
        shape = self.layers, 2, B * n, self.heads, L + room, self.size
        states = w["model.norm.weight"].new_empty(shape)
        hidden = self._read(w, tokens, mask, tokens.new_empty(B, n, 0), states)
        if not mask.all():
            bias = _bias(F.pad(mask.bool(), (0, room), value=True), hidden)[:, None, None].repeat_interleave(n, 0)
        return _logits(w, hidden[:, 0]), Cache(w, states, bias, mask.sum(-1).repeat_interleave(n), L)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """(rows, V) logits of the next token after appending tokens (rows,) to the cache."""
        end = cache.used + 1
        bias = None if cache.bias is None else cache.bias[..., :end]

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.states[i, :, :, :, :end]
            keys[:, :, -1], values[:, :, -1] = k, v
            # heads that share a key stand where several positions would
            return F.scaled_dot_product_attention(q.unflatten(1, (self.heads, -1)), keys, values, bias)

        hidden = self._layers(cache.weights, tokens, cache.positions, attend)
        cache.positions, cache.used = cache.positions + 1, end
        return _logits(cache.weights, hidden)

    def logits(self, params: Weights, tokens: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        """(B, n, T, V) before every token of y (B, n, T), in float32."""
        w = _plain(params)
        return _logits(w, self._read(w, tokens, mask, y[..., :-1])).unflatten(0, y.shape[:2])

    def log_prob(self, params: Weights, tokens: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        """(B, n, T) log-probabilities of the tokens of y, in float32."""
        w = _plain(params)
        hidden = self._read(w, tokens, mask, y[..., :-1]).flatten(0, 1)
        return token_log_prob(hidden, _head(w), y.flatten()).view(y.shape)

    def _read(self, w: Weights, tokens: Tensor, mask: Tensor, y: Tensor, states: Tensor | None = None) -> Tensor:
        """(B n, 1 + T, d) the last hidden states at the end of the prompts and at every token of y (B, n, T).

        All tokens go through the layers as one list, B L, then B n T: only attention tells prompts and responses apart.
        The keys and values of the prompts are left in `states`.
        """
        (B, L), (_, n, T), like = tokens.shape, y.shape, w["model.norm.weight"]
        seen, own = mask.bool(), torch.ones(L + T, L + T, dtype=torch.bool, device=mask.device).tril()
        padded, within, after = not mask.all(), None, _bias(own[L:], like)
        if padded:
            # padding sees itself, so that no softmax is empty
            within = _bias(own[:L, :L] & (seen[:, None] | own[:L, :L].T), like)[:, None]
            after = _bias(own[L:] & F.pad(seen, (0, T), value=True)[:, None], like)[:, None].repeat_interleave(n, 0)

        def parts(x: Tensor) -> tuple[Tensor, Tensor]:
            prompts, rest = x.tensor_split([len(x) - B * n * T])
            return prompts.unflatten(0, (B, -1)).transpose(1, 2), rest.unflatten(0, (B * n, T)).transpose(1, 2)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (q, q_y), (k, k_y), (v, v_y) = parts(q), parts(k), parts(v)
            if states is not None:
                for to, prompts in zip(states[i], (k, v), strict=True):
                    to.unflatten(0, (B, n))[..., :L, :] = prompts[:, None]
            bias, causal = within if within is None else within[:, :, -q.shape[2] :], not padded and q.shape[2] == L
            out = [F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=True)]
            if T:
                k, v = (torch.cat([t.repeat_interleave(n, 0), t_y], 2) for t, t_y in ((k, k_y), (v, v_y)))
                out.append(F.scaled_dot_product_attention(q_y, k, v, after, enable_gqa=True))
            return torch.cat([one.transpose(1, 2).flatten(0, 1) for one in out])

        # padding counts as the first position, which its state is never asked for
        new = mask.sum(-1)[:, None, None] + torch.arange(T, device=mask.device).expand(y.shape)
        positions = torch.cat([(mask.cumsum(-1) - 1).clamp(min=0).flatten(), new.flatten()])
        wanted = torch.arange(len(positions), device=mask.device)
        wanted = torch.cat([wanted[: B * L].view(B, L)[:, -1], wanted[B * L :]])
        hidden = self._layers(w, torch.cat([tokens.flatten(), y.flatten()]), positions, attend, wanted)
        return torch.cat([hidden[:B].repeat_interleave(n, 0)[:, None], hidden[B:].unflatten(0, (B * n, T))], 1)

    def _layers(
        self, w: Weights, tokens: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None
    ) -> Tensor:
        """(tokens, d) the last hidden states; of the last layer only those at `wanted` are worked out."""
        x = F.embedding(tokens, w["model.embed_tokens.weight"])
        angle = positions[:, None, None] * self.frequencies
        cos, sin = ((f(angle) * self.amplitude).to(x.dtype) for f in (torch.cos, torch.sin))
        turn = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
        for i in range(self.layers):
            layer = self._layer, w, i, x, turn, attend, wanted if i == self.layers - 1 else None
            if isinstance(w, Gathered):  # the backward pass gathers the weights of a layer again, and holds one at most
                x = checkpoint(*layer, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer[0](*layer[1:])
        return self._norm(x, w["model.norm.weight"])

    def _layer(self, w: Weights, i: int, x: Tensor, turn: Tensor, attend: Attend, wanted: Tensor | None) -> Tensor:
        at = f"model.layers.{i}."
        y = self._norm(x, w[at + "input_layernorm.weight"])
        k, v = (self._linear(w, f"{at}self_attn.{name}_proj", y).unflatten(-1, (-1, self.size)) for name in "kv")
        k = _rotate(k, turn)
        if wanted is not None:
            x, y, turn = x[wanted], y[wanted], turn[:, wanted]
        q = _rotate(self._linear(w, at + "self_attn.q_proj", y).unflatten(-1, (-1, self.size)), turn)
        x = x + self._linear(w, at + "self_attn.o_proj", attend(i, q, k, v).flatten(1))
        y = self._norm(x, w[at + "post_attention_layernorm.weight"])
        y = F.silu(self._linear(w, at + "mlp.gate_proj", y)) * self._linear(w, at + "mlp.up_proj", y)
        return x + self._linear(w, at + "mlp.down_proj", y)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _linear(self, w: Weights, name: str, x: Tensor) -> Tensor:
        out, down = F.linear(x, w[name + ".weight"], w.get(name + ".bias")), w.get(name + ".lora_A.default.weight")
        if down is None:
            return out
        change = F.linear(F.linear(x.to(down.dtype), down), w[name + ".lora_B.default.weight"])
        return torch.add(out, change, alpha=self.scale).to(out.dtype)


def _plain(params: Weights) -> Weights:
    """The parameters by their names in `transformers`; those in shards are gathered as they are read."""
    named = _named(params)
    return Gathered(named) if any(map(is_sharded, named.values())) else named


def _named(params: Weights) -> dict[str, Tensor]:
    """The names of `transformers`, without what peft puts around them."""
    return {k.removeprefix("base_model.model.").replace(".base_layer.", "."): p for k, p in params.items()}


def _head(w: Weights) -> Tensor:
    return w["lm_head.weight"] if "lm_head.weight" in w else w["model.embed_tokens.weight"]


def _logits(w: Weights, hidden: Tensor) -> Tensor:
    return F.linear(hidden, _head(w)).float()


def _bias(seen: Tensor, like: Tensor) -> Tensor:
    """0 where seen, -inf elsewhere: attention would make it of a mask, in every layer again."""
    return like.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions, (x1, x2) cos + (-x2, x1) sin; the sign is in the sines."""
    return torch.addcmul(x * turn[0], x.roll(x.shape[-1] // 2, -1), turn[1])


def token_log_prob(hidden: Tensor, head: Tensor, chosen: Tensor) -> Tensor:
    """(rows,) log softmax(hidden @ head.T) at the chosen tokens, in float32, of states (rows, d) and a head (V, d).

    No more than `CHUNK` logits are held at a time, in the backward pass neither.
    """
    return _Chosen.apply(hidden, head, chosen)  # type: ignore[no-untyped-call]


class _Chosen(torch.autograd.Function):
    """log softmax(hidden @ head.T) at the chosen tokens, by blocks of rows; the gradient computes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, head, chosen)
        blocks = zip(*_blocks(len(head), hidden, chosen[:, None]), strict=True)
        return torch.cat([F.linear(x, head).float().log_softmax(-1).gather(-1, y) for x, y in blocks])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, head, chosen = ctx.saved_tensors
        to_hidden, to_head = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            to_head = torch.zeros_like(head, dtype=torch.float32)
        for x, y, g, out in zip(*_blocks(len(head), hidden, chosen[:, None], slope[:, None], to_hidden), strict=True):
            to_logits = F.linear(x, head).float().softmax(-1).mul_(-g).scatter_add_(-1, y, g)
            torch.mm(to_logits.to(head.dtype), head, out=out)
            if to_head is not None:
                to_head.addmm_(to_logits.T, x.float())
        return to_hidden, None if to_head is None else to_head.to(head.dtype), None


def _blocks(width: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(max(1, CHUNK // width)) for tensor in tensors]
