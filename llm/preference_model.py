"""Judges that are learned: a pairwise preference model, and a Bradley-Terry reward model as its baseline."""

from __future__ import annotations

import copy
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import scipy
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nlhf.llm.causal_lm import (
    bytes_tokenizer,
    draw_weights,
    load_pretrained,
    prompt_tokens,
    trainable,
    with_adapters,
)
from nlhf.llm.data import Comparison, Prompt
from nlhf.llm.policy import Params
from nlhf.metrics import Floats
from nlhf.run import write_atomically
from nlhf.schedules import check_count

Input: TypeAlias = tuple[Any, ...]
"""What the network reads at once: a prompt, then one response or two."""

WEIGHTS = "model.safetensors"
ROWS = 32  # inputs that are read at once


class LearnedJudge(ABC):
    """What the two models share: P(a > b | x) = sigmoid(s(one input) - s(another)), s a linear head on a transformer.

    The head reads the last layer at the last token. It starts at zero, so that every probability starts at 1/2. An
    input is the prompt as `CausalLM` writes it, then each response and an end token. Swapping a and b swaps the two
    inputs, whatever the weights: P(a > b) + P(b > a) = 1 to the last bit. A judge is a value; `fit_preference` makes a
    new one of new parameters, and the network itself is never changed.

    Args:
        network: the transformer with its head, in evaluation mode.
        tokenizer: its tokenizer, with an end token.
        params: the trainable parameters by name.
        length: the most tokens that are read: the last ones of a prompt, the first ones of a response.
        base: where the frozen weights come from, if there are any: `from_pretrained`'s path, lora_rank and dtype.

    Raises ValueError if the inputs can be longer than the network's positions.
    """

    antisymmetric = True

    def __init__(
        self, network: Scorer, tokenizer: Any, params: Params, length: int, base: Mapping[str, Any] | None = None
    ) -> None:
        check_count("length", length, 1)
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must have an end-of-sequence token, got none")
        longest = len(self.sides("", "", "")[0]) * (length + 1) - 1
        positions = getattr(network.backbone.config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ValueError(f"length must leave room for {longest} tokens in {positions} positions, got {length}")
        self.network, self.tokenizer, self.params, self.length, self.base = network, tokenizer, params, length, base

    @staticmethod
    @abstractmethod
    def sides(x: Prompt, a: str, b: str) -> tuple[Input, Input]:
        """The two inputs whose scores are compared."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        length: int = 512,
        lora_rank: int | None = 8,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Self:
        """On a local Hugging Face folder or GGUF file, without its language-model head. Nothing is downloaded.

        Args:
            path: the folder or file. With adapters, what is saved refers to it.
            length: the most tokens that are read of a prompt and of each response.
            lora_rank: rank of the adapters on every linear layer; None trains all weights.
            dtype: of the network; head and adapters are always float32.
            seed: of the adapters.

        Raises FileNotFoundError if there is no model at `path`, ModuleNotFoundError without the `llm` extra.
        """
        network, tokenizer = load_pretrained(path, dtype, adapters=lora_rank is not None)
        backbone = network.base_model.requires_grad_(lora_rank is None)
        base = None
        if lora_rank is not None:
            backbone = with_adapters(backbone, lora_rank, "FEATURE_EXTRACTION")
            base = {"path": str(Path(path).resolve()), "lora_rank": lora_rank, "dtype": str(dtype).split(".")[1]}
        scorer = Scorer(backbone).eval()
        return cls(scorer, tokenizer, trainable(scorer, seed), length, base)

    @classmethod
    def from_scratch(
        cls, *, width: int = 64, layers: int = 2, heads: int = 4, length: int = 256, seed: int = 0
    ) -> Self:
        """On a small Llama over bytes with random weights, N(0, 1 / fan_in): for tests and small experiments."""
        from transformers import LlamaConfig, LlamaModel

        tokenizer = bytes_tokenizer()
        # No pad_token_id: the end token pads, and torch would never train the embedding of a padding token.
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=3 * (length + 1),
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        scorer = _built(LlamaModel, config)
        draw_weights(scorer, seed)
        return cls(scorer, tokenizer, trainable(scorer, seed), length)

    def __call__(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> Floats:
        """(N,) P(a > b | x)."""
        with torch.no_grad():
            margin = self.margins(prompts, a, b).double().numpy(force=True)
        likely = scipy.special.expit(np.abs(margin))  # at least 1/2, where 1 - p is exact
        return np.where(margin >= 0, likely, 1 - likely)

    def margins(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """(N,) the logits of P(a > b | x). Every distinct input is read once, together with others of its length."""
        pairs = [self.sides(*row) for row in zip(prompts, a, b, strict=True)]
        tokens = self._tokens({side for pair in pairs for side in pair})
        # The order must not depend on who is a and who is b: the last bit of a score depends on its batch.
        inputs = sorted(tokens, key=lambda side: (len(tokens[side]), repr(side)))
        scores = torch.cat(
            [self._score([tokens[s] for s in inputs[i : i + ROWS]]) for i in range(0, len(inputs), ROWS)]
        )
        place = {side: i for i, side in enumerate(inputs)}
        one, two = torch.tensor([[place[side] for side in pair] for pair in pairs], device=scores.device).T
        return scores[one] - scores[two]

    def cut(self, comparisons: Sequence[Comparison]) -> int:
        """How many of the comparisons have a prompt or a response of more than `length` tokens."""
        prompts = {x: prompt_tokens(self.tokenizer, x) for x in {c.prompt for c in comparisons}}
        texts = self._responses({text for c in comparisons for text in (c.a, c.b)})
        return sum(max(len(prompts[c.prompt]), len(texts[c.a]), len(texts[c.b])) > self.length for c in comparisons)

    def _tokens(self, inputs: set[Input]) -> dict[Input, list[int]]:
        prompts = {x: prompt_tokens(self.tokenizer, x)[-self.length :] for x in {x for x, *_ in inputs}}
        ended = {
            text: [*tokens[: self.length], self.tokenizer.eos_token_id]
            for text, tokens in self._responses({text for _, *texts in inputs for text in texts}).items()
        }
        return {side: sum((ended[text] for text in side[1:]), prompts[side[0]]) for side in inputs}

    def _responses(self, texts: set[str]) -> dict[str, list[int]]:
        listed = sorted(texts)
        # A response that spells the end token must not be read as two responses.
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return dict(zip(listed, self.tokenizer(listed, **options)["input_ids"], strict=True))

    def _score(self, rows: list[list[int]]) -> Tensor:
        """(len(rows),). Padding is on the right, where neither a position nor a causal mask sees it."""
        device, longest = self.params["head"].device, max(map(len, rows))
        tokens = torch.tensor(
            [row + [self.tokenizer.eos_token_id] * (longest - len(row)) for row in rows], device=device
        )
        mask = torch.arange(longest, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
        return functional_call(self.network, dict(self.params), (tokens, mask.long()))

    def with_params(self, params: Params) -> Self:
        """This network with other parameters."""
        judge = copy.copy(self)
        judge.params = params
        return judge

    def save(self, folder: str | PathLike[str], *, about: Mapping[str, Any] | None = None, **more: Tensor) -> None:
        """Write the judge to a folder: one .safetensors file with a JSON header, and without a base its configuration.

        Args:
            folder: made if it is not there. The file of weights is replaced as a whole or not at all.
            about: what else the header is to say, for a checkpoint.
            more: what else the file is to hold.
        """
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.base is None:
            self._save_configuration(folder)
        header = {"kind": type(self).__name__, "length": self.length, "base": self.base, **(about or {})}
        tensors = {name: p.detach().contiguous() for name, p in {**self.params, **more}.items()}
        write_atomically(folder / WEIGHTS, save(tensors, {"nlhf": json.dumps(header)}))

    def _save_configuration(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as written:
            self.tokenizer.save_pretrained(written)
            self.network.backbone.config.save_pretrained(written)
            for file in Path(written).iterdir():
                write_atomically(folder / file.name, file.read_bytes())

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> Self:
        """The judge that `save` wrote, to the last bit. `LearnedJudge.load` loads either kind. Nothing is unpickled.

        Raises ValueError if the folder holds something else, FileNotFoundError if nothing, or if the base is gone.
        """
        tensors, about = read_weights(folder)
        kind = {kind.__name__: kind for kind in (PreferenceModel, BradleyTerry)}.get(about.get("kind", ""))
        if kind is None or not issubclass(kind, cls):
            raise ValueError(f"{folder}: expected a {cls.__name__}, got {about.get('kind', 'another kind of model')}")
        if about["base"] is None:
            from transformers import AutoConfig, AutoModel, AutoTokenizer

            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            dtype = next(p.dtype for name, p in tensors.items() if name.startswith("backbone."))
            network = _built(AutoModel.from_config, config).to(dtype)
            judge: Any = kind(network, tokenizer, trainable(network, 0), about["length"])
        else:
            base = {**about["base"], "dtype": getattr(torch, about["base"]["dtype"])}
            judge = kind.from_pretrained(base.pop("path"), length=about["length"], **base)
        if missing := judge.params.keys() - tensors.keys():
            raise ValueError(f"{Path(folder, WEIGHTS)}: has no {min(missing)}")
        return judge.with_params({name: tensors[name] for name in judge.params})

    def __repr__(self) -> str:
        weights = sum(p.numel() for p in self.params.values())
        return f"{type(self).__name__}(trainable={weights}, length={self.length})"


class PreferenceModel(LearnedJudge):
    """A pairwise preference model: it reads prompt and both responses together, so its taste may be intransitive.

        P(a > b | x) = sigmoid(f(x, a, b) - f(x, b, a))

    >>> model = PreferenceModel.from_scratch(width=8, layers=1, heads=2)
    >>> model(["How was the film?"], ["good"], ["bad"])
    array([0.5])

    Source: Munos et al. 2024, arXiv:2312.00886, section 3; antisymmetric by construction, theirs by averaging.
    """

    @staticmethod
    def sides(x: Prompt, a: str, b: str) -> tuple[Input, Input]:
        """(x, a, b) and (x, b, a)."""
        return (x, a, b), (x, b, a)


class BradleyTerry(LearnedJudge):
    """A reward model. It can express transitive preferences only: logit P(a > c) = logit P(a > b) + logit P(b > c).

        P(a > b | x) = sigmoid(r(x, a) - r(x, b))

    >>> model = BradleyTerry.from_scratch(width=8, layers=1, heads=2)
    >>> model(["How was the film?"], ["good"], ["bad"])
    array([0.5])

    Source: Bradley and Terry 1952.
    """

    @staticmethod
    def sides(x: Prompt, a: str, b: str) -> tuple[Input, Input]:
        """(x, a) and (x, b)."""
        return (x, a), (x, b)


class Scorer(nn.Module):
    """A linear head on the last token of a transformer without a head of its own."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone: Any = backbone
        backbone.config.use_cache = False
        self.head = nn.Parameter(torch.zeros(backbone.config.get_text_config().hidden_size))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(rows,) the scores of tokens (rows, L) where mask (rows, L) is 1."""
        hidden = self.backbone(input_ids=tokens, attention_mask=mask).last_hidden_state
        return hidden[torch.arange(len(tokens)), mask.sum(-1) - 1].to(self.head.dtype) @ self.head


def read_weights(folder: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote into a folder: the tensors by name, and the header. ValueError if it is something else."""
    from safetensors import SafetensorError, safe_open

    file = Path(folder, WEIGHTS)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            header = json.loads((opened.metadata() or {}).get("nlhf", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    return tensors, header


def _built(make: Any, config: Any) -> Scorer:
    """A scorer whose weights are still to be set."""
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        return Scorer(make(config)).eval()
