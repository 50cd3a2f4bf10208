"""Llama folders read without transformers, against transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nlhf.llm import CausalLM
from nlhf.llm.bare import BareLlama, BareTokenizer, bare_llama, bare_tokenizer
from nlhf.llm.causal_lm import load_pretrained
from tests.tiny import generator

transformers = pytest.importorskip("transformers", reason="the llm extra is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

PROMPTS = ["the film was <unk>", "me"]


def write_tokenizer(folder: Path, kind: str = "bytes") -> None:
    """Of words, without more; or of bytes, one pair of them merged, with a beginning that is added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    symbols = [
        *names.values(),
        "the",
        "film",
        "was",
        "so",
        "good",
        "me",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "th",
    ]
    words = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE(words, [("t", "h")]))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if kind == "bytes":
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast.save_pretrained(folder)


def write(folder: Path, **changes: Any) -> Path:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {
        "vocab_size": 300,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.6,
    }
    with torch.random.fork_rng():
        torch.random.manual_seed(0)  # transformers draws initial weights from the global generator
        config = transformers.LlamaConfig(**(sizes | changes))
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def both(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[CausalLM, CausalLM]:
    """Read without transformers, and with."""
    ours = CausalLM.from_pretrained(folder, max_new_tokens=6, lora_rank=None, dtype=dtype)
    network, tokenizer = load_pretrained(folder, dtype)
    return ours, CausalLM(network.eval(), tokenizer, {n: p.detach() for n, p in network.named_parameters()}, 6)


def assert_same(ours: CausalLM, theirs: CausalLM) -> None:
    """To the last bit: they are the same numbers."""
    assert list(ours.params) == list(theirs.params)
    for name, p in theirs.params.items():
        assert ours.params[name].dtype == p.dtype
        assert torch.equal(ours.params[name], p), name
    y, log_prob = theirs.sample(PROMPTS, 3, generator())
    assert all(map(torch.equal, ours.sample(PROMPTS, 3, generator()), (y, log_prob)))
    assert torch.equal(ours.log_prob(PROMPTS, y), theirs.log_prob(PROMPTS, y))
    assert ours.text(y) == theirs.text(y)


OLD = {"rope_theta": 5e5, "rope_scaling": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"dtype": torch.bfloat16}, OLD], ids=str)
def test_what_is_read_is_what_transformers_read(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    folder = write(tmp_path / "model", **(changes if changes is not OLD else {}))
    if changes is OLD:  # as transformers 4 wrote it
        edit(folder / "config.json", lambda config: (config.pop("rope_parameters"), config.update(OLD)))
    ours, theirs = both(folder, dtype)
    assert isinstance(ours.network, BareLlama)
    assert isinstance(ours.tokenizer, BareTokenizer)
    assert torch.equal(ours.network.inv_freq, theirs.network.get_buffer("model.rotary_emb.inv_freq"))
    assert_same(ours, theirs)


def test_weights_in_several_files(folder: Path) -> None:
    _, theirs = both(folder)
    theirs.network.save_pretrained(folder, max_shard_size="10KB")  # type: ignore[operator]
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    for whole in (False, True):
        if whole:  # which is read rather than the parts
            write(folder, initializer_range=0.3)
        else:
            (folder / "model.safetensors").unlink(missing_ok=True)
        ours, theirs = both(folder)
        assert isinstance(ours.network, BareLlama)
        assert_same(ours, theirs)


def test_a_file_that_is_changed_later_changes_nothing(folder: Path) -> None:
    ours = CausalLM.from_pretrained(folder, lora_rank=None)
    before = {name: p.clone() for name, p in ours.params.items()}
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert all(torch.equal(p, before[name]) for name, p in ours.params.items())


@pytest.mark.parametrize("rounded", [False, True])
def test_what_is_written_is_what_transformers_would_write(folder: Path, tmp_path: Path, rounded: bool) -> None:
    if rounded:  # and by its older name
        edit(folder / "config.json", lambda config: config.update(torch_dtype=config.pop("dtype")))
    ours, theirs = both(folder, torch.bfloat16 if rounded else torch.float32)
    assert isinstance(ours.network, BareLlama)
    for name, policy in (("ours", ours), ("theirs", theirs)):
        moved = policy.with_params({name: p + 0.25 for name, p in policy.params.items()})
        moved.save_pretrained(tmp_path / name)
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], p) for name, p in weights[1].items())
    where = {"is_local": True, "local_files_only": True}  # theirs also tells how it was found
    for name in names - {"model.safetensors"}:
        mine, other = (json.loads((tmp_path / side / name).read_text()) for side in ("ours", "theirs"))
        assert mine | (where if name == "tokenizer_config.json" else {}) == other, name
    assert_same(*both(tmp_path / "ours", torch.bfloat16 if rounded else torch.float32))


TEXT = st.lists(st.sampled_from(["<s>", "</s>", "<unk>", " ", "the", "film", "was", "\n"]) | st.text(max_size=5)).map(
    "".join
)


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    write(tmp_path)
    write_tokenizer(tmp_path, kind)
    ours, theirs = bare_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None
    assert ours.eos_token_id == theirs.eos_token_id == 2

    @given(TEXT, st.booleans())
    def same(text: str, special: bool) -> None:
        tokens = ours(text, add_special_tokens=special)["input_ids"]
        assert tokens == theirs(text, add_special_tokens=special)["input_ids"]
        assert ours.decode(tokens) == theirs.decode(tokens)
        for skip in (False, True):
            texts = theirs.batch_decode([tokens, []], skip_special_tokens=skip)
            assert ours.batch_decode([tokens, []], skip_special_tokens=skip) == texts

    same()
    side = {"direction": "Right"}
    cut = side | {"max_length": 2, "strategy": "LongestFirst", "stride": 0}
    filled = side | {"strategy": {"Fixed": 9}, "pad_id": 0, "pad_token": "<unk>", "pad_type_id": 0}
    for change in ({"truncation": cut}, {"padding": filled | {"pad_to_multiple_of": None}}):
        edit(tmp_path / "tokenizer.json", partial(dict.update, **change))
        again, text = bare_tokenizer(tmp_path), "the film was so good"
        assert again is not None
        assert again(text)["input_ids"] == ours(text)["input_ids"]
        assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ours(text)["input_ids"]


# --- what is left to transformers -----------------------------------------------------------------------------------


Change: TypeAlias = Callable[[Path], object]


def config(**changes: Any) -> Change:
    return lambda folder: edit(folder / "config.json", lambda content: content.update(changes))


def without(key: str) -> Change:
    return lambda folder: edit(folder / "config.json", lambda content: content.pop(key))


def file(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
NETWORKS: dict[str, Change] = {
    "another kind": config(model_type="mistral"),
    "another activation": config(hidden_act="gelu"),
    "stretched positions": config(rope_parameters=ROPE),
    "stretched positions as of old": config(rope_scaling=ROPE),
    "positions of a part": config(partial_rotary_factor=0.5),
    "biases of attention": config(attention_bias=True),
    "biases elsewhere": config(mlp_bias=True),
    "code of its own": config(auto_map={"AutoModelForCausalLM": "modeling.Mine"}),
    "quantised": config(quantization_config={"quant_method": "bitsandbytes"}),
    "positions that are not told": without("rope_parameters"),
    "a size that is not told": without("num_key_value_heads"),
    "a head that is not told": without("tie_word_embeddings"),
    "a wrong size": config(intermediate_size=25),
    "no size": config(num_attention_heads=0, head_dim=None),
    "a size in words": config(hidden_size="16"),
    "no settings": file("config.json", "[]"),
    "no JSON": file("config.json", "{"),
    "a head besides the tied one": config(tie_word_embeddings=True),
    "no head": weights(lambda tensors: tensors.pop("lm_head.weight")),
    "more weights": weights(lambda tensors: tensors.update(extra=torch.zeros(2))),
    "whole numbers": weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)})),
    "more whole numbers": weights(lambda tensors: tensors.update(extra=torch.zeros(2, dtype=torch.int8))),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut off": file("model.safetensors", "{"),
    "an index that is none": lambda folder: (
        (folder / "model.safetensors").rename(folder / "model.bin"),
        (folder / "model.safetensors.index.json").write_text('{"weight_map": []}'),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_left_to_transformers(name: str, folder: Path) -> None:
    assert bare_llama(folder, torch.float32) is not None
    NETWORKS[name](folder)
    assert bare_llama(folder, torch.float32) is None


def test_numbers_that_our_forward_pass_does_not_know(folder: Path) -> None:
    assert bare_llama(folder, torch.float16) is None


def settings(**changes: Any) -> Change:
    return lambda folder: edit(folder / "tokenizer_config.json", lambda content: content.update(changes))


def end(**changes: Any) -> Change:
    return lambda folder: edit(folder / "tokenizer.json", lambda content: content["added_tokens"][2].update(changes))


TOKENIZERS: dict[str, Change] = {
    "a chat template": file("chat_template.jinja", "{{ messages }}"),
    "a chat template as of old": settings(chat_template="{{ messages }}"),
    "several chat templates": lambda folder: (folder / "additional_chat_templates").mkdir(),
    "tokens told elsewhere": file("special_tokens_map.json", "{}"),
    "tokens added elsewhere": file("added_tokens.json", "{}"),
    "tokens told twice": settings(added_tokens_decoder={}),
    "a class of its own": settings(tokenizer_class="LlamaTokenizer"),
    "no class": lambda folder: edit(folder / "tokenizer_config.json", lambda content: content.pop("tokenizer_class")),
    "no end": lambda folder: edit(folder / "tokenizer_config.json", lambda content: content.pop("eos_token")),
    "an end that is no token": settings(eos_token="<nowhere>"),
    "an end with properties": settings(eos_token={"content": "</s>", "lstrip": True}),
    "an end that eats spaces": end(lstrip=True),
    "an end that is nothing special": end(special=False),
    "spaces cleaned up": settings(clean_up_tokenization_spaces=True),
    "a beginning that is asked for": settings(add_bos_token=True),
    "no JSON": file("tokenizer_config.json", "{"),
    "no tokenizer": file("tokenizer.json", "{}"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_left_to_transformers(name: str, folder: Path) -> None:
    assert bare_tokenizer(folder) is not None
    TOKENIZERS[name](folder)
    assert bare_tokenizer(folder) is None


def test_a_bare_network_with_a_tokenizer_of_transformers(folder: Path) -> None:
    """The chat template is not ours to read."""
    TOKENIZERS["a chat template"](folder)
    ours, theirs = both(folder)
    assert isinstance(ours.network, BareLlama)
    assert isinstance(ours.tokenizer, transformers.PreTrainedTokenizerBase)
    assert ours.tokenizer.chat_template == "{{ messages }}"
    assert_same(ours, theirs)


def test_no_model_is_as_before(folder: Path) -> None:
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="give a Hugging Face folder or a GGUF file"):
        CausalLM.from_pretrained(folder, lora_rank=None)


def test_transformers_stay_out_of_a_training(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"the film was {i}"}) + "\n" for i in range(4)))
    code = f"""
import sys
from nlhf.cli import main
sys.argv = ["nlhf", "train", "nash-md", "--data", {str(data)!r}, "--model", {str(folder)!r}, "--lora-rank", "None",
    "--out", {str(tmp_path / "out")!r}, "--steps", "1", "--eval-prompts", "2", "--eval-n", "2", "--n", "2",
    "--prompts", "2", "--max-new-tokens", "4"]
main()
print(sorted({{"transformers", "peft"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
