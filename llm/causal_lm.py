"""Any Hugging Face causal language model as a policy. transformers and peft are imported when one needs them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nlhf.llm.bare import bare_llama, bare_tokenizer
from nlhf.llm.data import Prompt
from nlhf.llm.folders import converted, import_for_good, quiet_in_a_pipe, write_adapter, write_model
from nlhf.llm.llama import Llama, supported, token_log_prob
from nlhf.llm.policy import Params, TokenPolicy, alive
from nlhf.llm.shards import full, like, shard


class CausalLM(TokenPolicy):
    """A pretrained language model. Responses are rows of tokens, (B, n, T) padded at the end. A prompt is a string, the
    user's first turn, or a conversation, a tuple of messages (`nlhf.llm.data.Prompt`).

    The network is shared by every policy made of it and is never changed: a policy is the network called with
    parameters of its own. With LoRA these are the adapters, a few megabytes, and the reference is the policy whose
    adapters are zero. The log-probability counts the end token; a response without one is cut at T tokens.

    Under FSDP (`nlhf.llm.shards`) parameters are sharded, the frozen ones too, and all processes call every method
    together. A Llama-like network gathers them by layers, any other as a whole. Decoding gathers a policy once and
    holds it whole to the end: to gather at every token would be far too slow.

    Args:
        network: a `transformers` causal model, with adapters or without, in evaluation mode; or a `BareLlama`.
        tokenizer: its tokenizer, with an end token. A chat template is used if it has one.
        params: the trainable parameters by name.
        max_new_tokens: T.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, params: Params, max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must have an end-of-sequence token, got none")
        self.network, self.tokenizer, self.params = network, tokenizer, params
        self.length, self.eos = max_new_tokens, tokenizer.eos_token_id
        self.llama = Llama.of(network) if supported(network) else None
        self.head = None if self.llama else _plain_head(network)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        max_new_tokens: int = 32,
        lora_rank: int | None = 8,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> CausalLM:
        """Load a local Hugging Face folder, a GGUF file, or a folder with one GGUF file. Nothing is downloaded.

        All weights of a plain Llama are read, and saved again, without `transformers` (`nlhf.llm.bare`), which takes
        longer to import than the first steps of a small model take. They are the same weights and the same tokens.

        Args:
            path: the folder or file.
            max_new_tokens: T, the most tokens of a response.
            lora_rank: rank of the adapters on every linear layer; None trains all weights, of which every policy
                then keeps a copy.
            dtype: of the network; adapters are always float32.
            device: where it lives, "cpu" or "cuda".
            seed: of the adapters' first factor. The second is zero, so the policy starts at the model.

        Raises FileNotFoundError if there is no model at `path`, ModuleNotFoundError without the `llm` extra.
        """
        network, tokenizer = load_pretrained(path, dtype, adapters=lora_rank is not None, bare=lora_rank is None)
        network.requires_grad_(lora_rank is None)
        if lora_rank is not None:
            network = with_adapters(network, lora_rank, "CAUSAL_LM")
        shard(network, device)
        network = network.to(device)
        return cls(network.eval(), tokenizer, trainable(network, seed), max_new_tokens)

    @classmethod
    def from_scratch(
        cls,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        max_new_tokens: int = 32,
        lora_rank: int | None = None,
        seed: int = 0,
    ) -> CausalLM:
        """A small Llama over bytes with random weights, N(0, 1 / fan_in), that knows nothing: for tests.

        >>> policy = CausalLM.from_scratch(width=8, layers=1, heads=2, max_new_tokens=4)
        >>> policy.sample(["Hello!"], 2, torch.Generator().manual_seed(0))[0].shape
        torch.Size([1, 2, 4])
        """
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = bytes_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
            network: Any = LlamaForCausalLM(config)
        draw_weights(network, seed)
        network.requires_grad_(lora_rank is None)
        if lora_rank is not None:
            network = with_adapters(network, lora_rank, "CAUSAL_LM")
        shard(network)
        return cls(network.eval(), tokenizer, trainable(network, seed), max_new_tokens)

    def save_pretrained(self, folder: str | PathLike[str], *, adapter_only: bool = False) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` loads: weights, configuration and tokenizer.

        Weights are kept to the last bit. Adapters are merged into them, W + s B A rounded to the precision of W, so
        that log-probabilities agree to rounding only.

        Args:
            folder: written as a whole or not at all, by the first of several processes; an older copy is replaced.
            adapter_only: write the adapters instead, to the last bit, for `peft.PeftModel.from_pretrained`.

        Raises ValueError if there are no adapters to write, FileExistsError if `folder` holds other files.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     CausalLM.from_scratch(width=8, layers=1, heads=2).save_pretrained(folder)
        ...     CausalLM.from_pretrained(folder)
        CausalLM(PeftModelForCausalLM, trainable=1472, max_new_tokens=32)
        """
        if not adapter_only:
            write_model(Path(folder), self.network, self.params, self.tokenizer)
        elif hasattr(self.network, "peft_config"):
            write_adapter(Path(folder), self.network, self.params, self.tokenizer)
        else:
            raise ValueError("adapter_only must be False for a model without adapters, got True")

    def text(self, y: Tensor) -> list[list[str]]:
        """The responses (B, n, T) as strings, without their end tokens."""
        kept = [
            [row[keep].tolist() for row, keep in zip(*pair, strict=True)]
            for pair in zip(y, alive(y, self.eos), strict=True)
        ]
        return [self.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in kept]

    def encode(self, x: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """(B, L) tokens of the prompts, padded on the left, and the mask (B, L) of what is not padding."""
        rows = [prompt_tokens(self.tokenizer, prompt) for prompt in x]
        longest = max(map(len, rows))
        padding = self.tokenizer.eos_token_id
        padded = [[padding] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        at = next(iter(self.params.values())).device
        return torch.tensor(padded, device=at), torch.tensor(mask, device=at)

    def log_prob(self, x: Sequence[Prompt], y: Tensor) -> Tensor:
        """(B, n) log pi(y | x), end token included, in nats."""
        kept = alive(y, self.eos)
        y = y[..., : (longest := int(kept.sum(-1).max()))]  # what every response has ended before is not read
        if self.llama is not None:
            chosen = self.llama.log_prob(self._weights(), *self.encode(x), y)
        elif self.head is not None:
            states = self._outputs(x, y, states=True).flatten(0, 1)
            head = full(self.params.get(self.head, self.network.get_parameter(self.head)))
            chosen = token_log_prob(states, head, y.flatten()).view(y.shape)
        else:
            logits = self._outputs(x, y).unflatten(0, y.shape[:2])
            # gather before normalising: no second tensor of the vocabulary's size
            chosen = logits.gather(-1, y[..., None]).squeeze(-1) - logits.logsumexp(-1)
        return chosen.masked_fill(~kept[..., :longest], 0.0).sum(-1)

    def next_log_probs(self, x: Sequence[Prompt], y: Tensor) -> Tensor:
        """(B, n, T, V) log pi(. | x, y_<t)."""
        if self.llama is not None:
            return self.llama.logits(self._weights(), *self.encode(x), y).log_softmax(-1)
        return self._outputs(x, y).unflatten(0, y.shape[:2]).log_softmax(-1)

    def start(self, x: Sequence[Prompt], n: int) -> tuple[Tensor, Any]:
        """(B n, V) logits of the first token; every prompt is read once for its n responses."""
        if self.llama is not None:
            return self.llama.prefill(self._weights(), *self.encode(x), n, self.length)
        out, mask, weights = self._read(x)
        out.past_key_values.batch_repeat_interleave(n)
        first = out.logits[:, -1].float().repeat_interleave(n, 0)
        return first, (out.past_key_values, mask.repeat_interleave(n, 0), weights)

    def extend(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(rows, V) logits of the next token."""
        if self.llama is not None:
            return self.llama.decode(tokens, cache), cache
        past, mask, weights = cache
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        out = self._call(weights, tokens[:, None], mask, use_cache=True, past_key_values=past)
        return out.logits[:, -1].float(), (out.past_key_values, mask, weights)

    def keep(self, cache: Any, rows: Tensor) -> Any:
        """These rows of a cache alone."""
        if self.llama is not None:
            return cache.keep(rows)
        past, mask, weights = cache
        past.batch_select_indices(rows)
        return past, mask[rows], weights

    def _weights(self) -> Params:
        """All parameters by name; without adapters that change nothing, which is how the reference is told apart."""
        params, fixed = self.params, {name: p for name, p in self.network.named_parameters() if name not in self.params}
        idle = [p for name, p in params.items() if "lora_B" in name and not p.requires_grad]
        if idle and not any(full(p.any()) for p in idle):
            params = {name: p for name, p in params.items() if "lora_" not in name}
        return {**fixed, **params}

    def _outputs(self, x: Sequence[Prompt], y: Tensor, states: bool = False) -> Tensor:
        """(B n, T, V) logits before every token of y, in float32, or the states (B n, T, d) that the head reads."""

        def kept(out: Any) -> Tensor:
            return out.hidden_states[-1] if states else out.logits.float()

        n, T, tokens = *y.shape[1:], y.flatten(0, 1)
        options = {"logits_to_keep": 1, "output_hidden_states": True} if states else {}
        out, mask, weights = self._read(x, **options)
        found = kept(out)[:, -1:].repeat_interleave(n, 0)
        if T > 1:
            out.past_key_values.batch_repeat_interleave(n)
            mask = torch.cat([mask.repeat_interleave(n, 0), alive(tokens, self.eos)[:, :-1].long()], 1)
            options |= {"past_key_values": out.past_key_values, "use_cache": True}
            found = torch.cat([found, kept(self._call(weights, tokens[:, :-1], mask, **options))], 1)
        return found

    def _read(self, x: Sequence[Prompt], **options: Any) -> tuple[Any, Tensor, Params]:
        """What the network says at the end of every prompt, the mask (B, L), and all weights, gathered once."""
        tokens, mask = self.encode(x)
        weights = {name: full(p) for name, p in {**dict(self.network.named_parameters()), **self.params}.items()}
        return self._call(weights, tokens, mask, **{"use_cache": True, "logits_to_keep": 1, **options}), mask, weights

    def _call(self, weights: Params, tokens: Tensor, mask: Tensor, **options: Any) -> Any:
        # Positions count real tokens only: left padding must not shift them.
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **options}
        return functional_call(self.network, dict(weights), (), inputs)

    def __repr__(self) -> str:
        weights = sum(p.numel() for p in self.params.values())
        return f"CausalLM({type(self.network).__name__}, trainable={weights}, max_new_tokens={self.length})"


def prompt_tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens before a response: the prompt in the chat template, or the bare string where there is no template.

    Raises ValueError for a conversation without a template to write it in.
    """
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [m._asdict() for m in prompt]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string for a tokenizer without a chat template, got {prompt!r}")
    return list(tokenizer(prompt)["input_ids"])


def load_pretrained(
    path: str | PathLike[str], dtype: torch.dtype, *, adapters: bool = False, bare: bool = False
) -> tuple[Any, Any]:
    """The `transformers` causal model and the tokenizer of a local folder or GGUF file. Nothing is unpickled.

    Args:
        path: the folder or file.
        dtype: of the network.
        adapters: whether `with_adapters` follows, which needs peft.
        bare: whether those of `nlhf.llm.bare` will do, where they can stand in.

    Raises FileNotFoundError if there is no model at `path`, ModuleNotFoundError without the `llm` extra.
    """
    file, options = _locate(Path(path))

    def load(file: Path, **options: Any) -> tuple[Any, Any]:
        import_for_good("torch._dynamo")  # which an optimiser imports, or transformers
        network: Any = bare_llama(file, dtype) if bare and not options else None
        tokenizer: Any = None if network is None else bare_tokenizer(file)
        if tokenizer is None:
            models = ["transformers.modeling_utils"] if network is None else []
            import_for_good(*models, "transformers.models.auto.tokenization_auto", *["peft"] * adapters)
            from transformers import AutoModelForCausalLM, AutoTokenizer

            quiet_in_a_pipe()
            tokenizer = AutoTokenizer.from_pretrained(file, local_files_only=True, **options)
        if network is None:
            options |= {"local_files_only": True, "dtype": dtype, "use_safetensors": True}
            network = AutoModelForCausalLM.from_pretrained(file, **options)
        return network, tokenizer

    try:
        if options:
            found = converted(file / options["gguf_file"], lambda: load(file, **options), dtype)
            return load(found) if isinstance(found, Path) else found
        return load(file)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; language models need: pip install 'nlhf[llm]'") from None


def with_adapters(network: Any, rank: int, task: str) -> Any:
    """The network with LoRA adapters on every linear layer, for a task that peft knows by this name."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers deprecates
        return get_peft_model(network, adapters)


def trainable(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """The parameters to train by name: adapters as LoRA starts them, drawn from the seed, the others as they are."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: like(_initial_adapter(name, p, generator), p) if "lora_" in name else p.detach()
        for name, p in network.named_parameters()
        if p.requires_grad
    }


@torch.no_grad()
def _plain_head(network: Any) -> str | None:
    """The name of the matrix that makes logits of the last states, if nothing is added to them, capped or scaled."""
    head = network.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    named, matrix = dict(network.named_parameters()), full(head.weight)
    tokens = torch.linspace(0, len(matrix) - 1, 8, device=matrix.device).long()  # padding alone may read as 0
    weights = {name: full(p) for name, p in named.items()}
    out = functional_call(network, weights, (tokens[None],), {"output_hidden_states": True})
    plain = nn.functional.linear(out.hidden_states[-1], matrix)
    # the same product again, but for the order of its sums
    rounding = 8 * torch.finfo(plain.dtype).eps * float(plain.abs().max())
    same = out.logits.shape == plain.shape and float((plain - out.logits).abs().max()) <= rounding
    return next(name for name, p in named.items() if p is head.weight) if same else None


def _locate(path: Path) -> tuple[Path, dict[str, str]]:
    if path.suffix == ".gguf" and path.is_file():
        return path.parent, {"gguf_file": path.name}
    if (path / "config.json").is_file():
        return path, {}
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(found) == 1:
        return path, {"gguf_file": found[0].name}
    what = "no such file or folder" if not path.exists() else f"no config.json and {len(found)} GGUF files in it"
    raise FileNotFoundError(f"model {path}: {what}; give a Hugging Face folder or a GGUF file")


def _initial_adapter(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """LoRA: the first factor uniform with variance 1 / (3 fan_in), as peft draws it, the second zero."""
    if "lora_B" in name:
        return torch.zeros(like.shape)
    bound = 1 / math.sqrt(like.shape[1])
    return torch.empty(like.shape).uniform_(-bound, bound, generator=generator)


def bytes_tokenizer() -> Any:
    """Every byte is a token, and there is an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def draw_weights(network: nn.Module, seed: int) -> None:
    """Set every matrix to N(0, 1 / fan_in), in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 2:
                p.normal_(0.0, p.shape[1] ** -0.5, generator=generator)
