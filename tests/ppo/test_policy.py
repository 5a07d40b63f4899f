"""The policy: what trains, what is shared, in which dtype, and what lands on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from fastppo.models.packed import PackedModel
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.policy import Policy

# peft asks transformers by a name that transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CONFIGS: dict[str, Any] = {
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_dropout=0.3),
    "qwen3-untied": Qwen3Config(**SIZES, tie_word_embeddings=False, head_dim=16),
    "gpt2-tied": GPT2Config(  # with its default dropout of 0.1 everywhere
        vocab_size=97,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
TEMPERATURE = 0.7


def make_model(kind: str = "llama-tied", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[kind])
    for name, value in options.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).eval()


def make_lora(seed: int = 0, **options: Any) -> PeftModel:
    model = make_model(seed=seed)
    torch.manual_seed(seed + 1)
    config = LoraConfig(
        r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj", "up_proj"], **options
    )
    model = get_peft_model(model, config)
    assert isinstance(model, PeftModel)
    return model


def make_batch(seed: int = 0) -> PackedBatch:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 97, n) for n in (3, 8, 1)]
    return PackedBatch.pack(prompts, [rng.integers(0, 97, n) for n in (5, 1, 12)])


def logprobs(policy: Policy, batch: PackedBatch) -> Tensor:
    return policy.actor.logprobs(batch, TEMPERATURE).logprobs


def train_once(policy: Policy, batch: PackedBatch, lr: float = 0.1) -> None:
    """One step that reaches actor and critic."""
    parameters = policy.actor_parameters() + policy.critic_parameters()
    optimizer = torch.optim.SGD(parameters, lr=lr)
    loss = -logprobs(policy, batch).mean()
    if policy.value_head is not None:
        values = policy.values(policy.critic_hidden(batch, policy.actor.hidden(batch))[batch.rows])
        loss = loss + (values - 1.0).square().mean()
    loss.backward()
    optimizer.step()


def unpacked_logits(model: Any, batch: PackedBatch) -> Tensor:
    """(N, V) logits from an ordinary forward of each sequence."""
    found = []
    with torch.no_grad():
        for i in range(batch.num_sequences):
            one = batch.select([i])
            found.append(model(input_ids=one.input_ids.long()[None]).logits[0][one.rows.long()])
    return torch.cat(found)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.fixture(params=list(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# forward


def test_head_sees_response_rows_only_and_agrees_with_the_model(kind: str) -> None:
    model, batch = make_model(kind), make_batch()
    expected = unpacked_logits(model, batch)
    policy = Policy(model)
    with torch.no_grad():
        logits = policy.actor.hidden(batch)[batch.rows] @ policy.actor.head.weight.T
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_recomputation_is_exact(kind: str) -> None:
    policy, batch = Policy(make_model(kind), precision="bf16"), make_batch()
    with torch.no_grad():
        old = logprobs(policy, batch)
    assert torch.equal(logprobs(policy, batch).detach(), old)  # ratio == 1, bit for bit


def test_dropout_is_off_in_every_mode(kind: str) -> None:
    policy, batch = Policy(make_model(kind), critic="separate"), make_batch()
    for module in policy.modules().values():
        module.train()
    trained = policy.actor.hidden(batch), policy.critic_hidden(batch, policy.actor.hidden(batch))
    for module in policy.modules().values():
        module.eval()
    evaluated = policy.actor.hidden(batch), policy.critic_hidden(batch, policy.actor.hidden(batch))
    assert all(torch.equal(a, b) for a, b in zip(trained, evaluated, strict=True))


def test_lora_dropout_is_off() -> None:
    policy, batch = Policy(make_lora(init_lora_weights=False), reference="adapter"), make_batch()
    for module in policy.modules().values():
        module.train()
    first = policy.actor.hidden(batch)
    assert torch.equal(first, policy.actor.hidden(batch))
    for module in policy.modules().values():
        module.eval()
    assert torch.equal(first, policy.actor.hidden(batch))


def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = Policy(make_model(kind), gradient_checkpointing=checkpointing, train_layers=2)
        logprobs(policy, make_batch()).sum().backward()
        gradients.append([p.grad for p in policy.actor_parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_gradient_flows_after_a_pass_without_gradients_in_one_autocast() -> None:
    policy, batch = Policy(make_model(), precision="bf16"), make_batch()
    with policy.actor.autocast():
        with torch.no_grad():
            policy.actor.hidden(batch)
        policy.actor.hidden(batch).sum().backward()
    assert all(p.grad is not None for p in policy.actor_parameters())


# critic


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_values_start_at_zero_in_fp32(critic: Any, precision: Any) -> None:
    policy, batch = Policy(make_model(), critic=critic, precision=precision), make_batch()
    with policy.actor.autocast():
        hidden = policy.critic_hidden(batch, policy.actor.hidden(batch))[batch.rows]
        values = policy.values(hidden)
        assert torch.equal(values, torch.zeros(batch.num_responses))
        train_once(policy, batch)
        values = policy.values(hidden.bfloat16())
    assert values.dtype == torch.float32
    head = policy.value_head
    expected = hidden.bfloat16().double() @ head.weight[0].double() + head.bias.double()
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-5)


def test_no_critic_has_no_values() -> None:
    policy = Policy(make_model(), critic="none")
    assert policy.value_head is None and policy.critic_parameters() == []
    with pytest.raises(ValueError, match="^critic: expected"):
        policy.values(torch.zeros(1, 64))


def test_actor_and_critic_parameters_are_disjoint_and_all_learn() -> None:
    policy, batch = Policy(make_model(), critic="separate"), make_batch()
    actor, critic = policy.actor_parameters(), policy.critic_parameters()
    assert not {id(p) for p in actor} & {id(p) for p in critic}
    train_once(policy, batch)  # the value head leaves zero, so that a gradient passes it
    before = [p.detach().clone() for p in actor + critic]
    train_once(policy, batch)
    unchanged = [p for p, b in zip(actor + critic, before, strict=True) if torch.equal(p, b)]
    assert unchanged == []


def test_separate_critic_starts_as_the_actor_and_moves_alone() -> None:
    policy, batch = Policy(make_model(), critic="separate"), make_batch()
    hidden = policy.actor.hidden(batch)
    assert torch.equal(policy.critic_hidden(batch, hidden), hidden)
    train_once(policy, batch)
    train_once(policy, batch)
    assert not torch.equal(policy.critic_hidden(batch, hidden), policy.actor.hidden(batch))


def test_reward_model_starts_the_critic() -> None:
    torch.manual_seed(5)
    config = LlamaConfig(**SIZES | {"hidden_size": 32}, num_labels=1)  # smaller than the actor
    reward_model = AutoModelForSequenceClassification.from_config(config).eval()
    batch = make_batch()
    expected = []
    with torch.no_grad():
        for i in range(batch.num_sequences):
            one = batch.select([i]).input_ids.long()[None]
            expected.append(reward_model.score(reward_model.model(one).last_hidden_state[0]))
    policy = Policy(make_model(), critic="separate", value_model=reward_model)
    values = policy.values(policy.critic_hidden(batch, policy.actor.hidden(batch)))
    torch.testing.assert_close(values, torch.cat(expected)[:, 0], atol=1e-5, rtol=0)


# reference


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("train_layers", [None, 1])
def test_copied_reference_stays_where_the_policy_started(
    kind: str, precision: Any, train_layers: int | None
) -> None:
    policy, batch = (
        Policy(make_model(kind), precision=precision, train_layers=train_layers),
        make_batch(),
    )
    with torch.no_grad():
        start = logprobs(policy, batch)
    ref = policy.reference.logprobs(batch, TEMPERATURE).logprobs
    assert ref is not None and ref.dtype == torch.float32 and not ref.requires_grad
    torch.testing.assert_close(ref, start, atol=1e-5 if precision == "fp32" else 0.02, rtol=0)
    train_once(policy, batch)
    assert torch.equal(policy.reference.logprobs(batch, TEMPERATURE).logprobs, ref)
    assert not torch.equal(logprobs(policy, batch), start)


def test_reference_shares_what_is_frozen() -> None:
    policy = Policy(make_model(), train_layers=1, precision="bf16")
    layer = sum(p.numel() for p in policy.actor.model.model.layers[-1].parameters())
    norm = policy.actor.model.model.norm.weight.numel()
    total = sum(p.numel() for p in policy.actor.model.parameters())
    head = 64 + 1
    assert policy.num_parameters() == {
        "trainable": layer + norm + head,
        "total": total + head,
        "reference": layer + norm,
    }


def test_temperature_divides_the_reference_too() -> None:
    policy, batch = Policy(make_model()), make_batch()
    logits = unpacked_logits(make_model(), batch)
    expected = (logits / 0.5).log_softmax(-1).gather(1, batch.targets.long()[:, None])[:, 0]
    torch.testing.assert_close(
        policy.reference.logprobs(batch, 0.5).logprobs, expected, atol=1e-4, rtol=0
    )


def test_given_reference_is_used_and_frozen() -> None:
    ref_model, batch = make_model(seed=9), make_batch()
    logits = unpacked_logits(ref_model, batch)
    policy = Policy(make_model(), ref_model=ref_model)
    expected = logits.log_softmax(-1).gather(1, batch.targets.long()[:, None])[:, 0]
    torch.testing.assert_close(
        policy.reference.logprobs(batch, 1.0).logprobs, expected, atol=1e-4, rtol=0
    )
    assert not any(p.requires_grad for p in ref_model.parameters())


def test_no_reference_gives_none() -> None:
    assert Policy(make_model(), reference="none").reference is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapter_reference_is_the_base(precision: Any) -> None:
    policy = Policy(make_lora(), reference="adapter", precision=precision)
    batch = make_batch()
    base = {n: p for n, p in snapshot(policy.actor.model).items() if "lora_" not in n}
    with torch.no_grad():
        start = logprobs(policy, batch)
    ref = policy.reference.logprobs(batch, TEMPERATURE).logprobs
    assert ref is not None and torch.equal(ref, start)  # a fresh adapter adds exactly nothing
    train_once(policy, batch, lr=1.0)
    train_once(policy, batch, lr=1.0)
    after = snapshot(policy.actor.model)
    assert all(torch.equal(after[name], base[name]) for name in base)
    assert torch.equal(policy.reference.logprobs(batch, TEMPERATURE).logprobs, ref)
    assert (logprobs(policy, batch) - ref).abs().max() > 1e-3
    assert all(p.requires_grad for n, p in policy.actor.model.named_parameters() if "lora_" in n)


# what trains, and in which dtype


def test_last_layers_train_and_nothing_else(kind: str) -> None:
    policy, batch = Policy(make_model(kind), train_layers=1, reference="none"), make_batch()
    before = snapshot(policy.actor.model)
    train_once(policy, batch)
    changed = {n for n, p in policy.actor.model.named_parameters() if not torch.equal(p, before[n])}
    layers, norm = (
        ("transformer.h.2.", "transformer.ln_f.")
        if "gpt2" in kind
        else (
            "model.layers.2.",
            "model.norm.",
        )
    )
    assert changed == {n for n in before if n.startswith((layers, norm))}


def test_bf16_keeps_fp32_masters_and_rounds_only_frozen_products(kind: str) -> None:
    policy = Policy(make_model(kind), train_layers=1, precision="bf16")
    for name, p in policy.actor.model.named_parameters():
        frozen_product = not p.requires_grad and any(
            part in name
            for part in ("proj", "c_attn", "c_fc", "lm_head")
            if not (part == "lm_head" and "tied" in kind and "untied" not in kind)
        )
        assert p.dtype == (torch.bfloat16 if frozen_product else torch.float32), name


def test_storing_frozen_weights_rounded_changes_no_result(kind: str) -> None:
    batch = make_batch()
    rounded = Policy(make_model(kind), train_layers=1, precision="bf16")
    stored = Policy(make_model(kind), precision="bf16")  # everything in fp32
    with torch.no_grad():
        assert torch.equal(rounded.actor.hidden(batch), stored.actor.hidden(batch))
        assert torch.equal(logprobs(rounded, batch), logprobs(stored, batch))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_small_update_survives_on_weights_loaded_in_bf16(precision: Any) -> None:
    policy = Policy(make_model().to(torch.bfloat16), precision=precision, reference="none")
    before = snapshot(policy.actor.model)
    optimizer = torch.optim.Adam(policy.actor_parameters(), lr=1e-6)
    logprobs(policy, make_batch()).sum().backward()
    optimizer.step()
    name = "model.layers.0.mlp.up_proj.weight"
    changed = policy.actor.model.get_parameter(name) != before[name]
    assert changed.float().mean() > 0.95  # in bf16 it is 0.002


def test_restored_model_is_ordinary(kind: str) -> None:
    model, batch = make_model(kind), make_batch()
    own = model.config._attn_implementation
    policy = Policy(model, train_layers=1, precision="bf16")
    assert model.config._attn_implementation == "fastppo"
    policy.restore()
    assert model.config._attn_implementation == own
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert unpacked_logits(model, batch).isfinite().all()


def test_an_attention_chosen_in_between_is_kept() -> None:
    packed = PackedModel(make_model("llama-tied"), precision=None)
    packed.restore()
    packed.model.set_attn_implementation("eager")
    with packed.lent():
        assert packed.model.config._attn_implementation == "fastppo"
    assert packed.model.config._attn_implementation == "eager"
    with packed.lent(), packed.unpacked() as model:
        assert model.config._attn_implementation == "eager"


def test_other_models_of_the_same_configuration_are_left_alone() -> None:
    config = copy.deepcopy(CONFIGS["llama-tied"])
    first, second = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    Policy(first)
    assert second(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, 97)


def test_unpacked_gives_the_model_back_and_takes_it_again() -> None:
    policy, batch = Policy(make_model(), train_layers=1, precision="bf16"), make_batch()
    expected = logprobs(policy, batch)
    weight = policy.actor.model.lm_head.weight
    with policy.unpacked() as model, policy.actor.autocast(), torch.no_grad():
        assert not model.training and model.lm_head.weight is weight
        logits = unpacked_logits(model, batch).float() / TEMPERATURE
    assert policy.actor.model.training
    assert torch.equal(logprobs(policy, batch), expected)
    own = logits.log_softmax(-1).gather(1, batch.targets.long()[:, None])[:, 0]
    torch.testing.assert_close(own, expected, atol=0.02, rtol=0)


# contradictions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "adapter"}, "reference: 'adapter' needs a PEFT model"),
        ({"train_layers": 4}, "train_layers: expected 1 to 3"),
        ({"train_layers": 0}, "train_layers: expected 1 to 3"),
    ],
    ids=str,
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(make_model(), **options)


def test_unsuitable_models_are_refused() -> None:
    model = make_model()
    other = make_model()
    for shared in (other, other.model):
        with pytest.raises(ValueError, match="^value_model: .* sharing weights with ref_model"):
            Policy(model, critic="separate", ref_model=other, value_model=shared)
    with pytest.raises(ValueError, match="^ref_model: expected"):
        Policy(model, ref_model=model)
    with pytest.raises(ValueError, match="^value_model: expected"):
        Policy(model, value_model=make_model())
    with pytest.raises(ValueError, match="vocabulary of model, 97 tokens, got 50"):
        smaller = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | {"vocab_size": 50}))
        Policy(model, ref_model=smaller)
    with pytest.raises(ValueError, match="plain linear output head, got LlamaModel with none"):
        Policy(model.model)
    with pytest.raises(ValueError, match="got a model that is all frozen"):
        Policy(make_model().requires_grad_(False))
    with pytest.raises(ValueError, match="with 1 label, got 2"):
        labels = AutoModelForSequenceClassification.from_config(LlamaConfig(**SIZES))
        Policy(make_model(), critic="separate", value_model=labels)
    with pytest.raises(ValueError, match="^train_layers: expected"):
        Policy(make_lora(), train_layers=1)
    # what was refused is as ordinary as before
    assert {m.config._attn_implementation for m in (model, labels)} == {"sdpa"}
    with pytest.raises(ValueError, match="^train_layers: expected"):
        Policy(model, critic="separate", value_model=other, train_layers=4)
    deeper = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="^train_layers: .* the layers of model"):
        Policy(model, critic="separate", value_model=deeper, train_layers=4)
    for m in (model, other, deeper):
        assert m.config._attn_implementation == "sdpa"
        assert all(p.requires_grad for p in m.parameters())


# on disk


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("train_layers", [None, 1])
def test_saved_model_is_the_trained_one(
    kind: str, precision: Any, train_layers: int | None, tmp_path: Path
) -> None:
    model, batch = make_model(kind), make_batch()
    policy = Policy(model, precision=precision, train_layers=train_layers)
    train_once(policy, batch)
    policy.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "fastppo"  # saving did not disturb the policy
    text = (tmp_path / "config.json").read_text()
    assert "fastppo" not in text and json.loads(text)["dtype"] == "float32"
    policy.restore()
    assert torch.equal(unpacked_logits(loaded, batch), unpacked_logits(model, batch))
    for name, p in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p), name


def test_saved_lora_is_merged_and_kept_apart(tmp_path: Path) -> None:
    policy, batch = Policy(make_lora(), reference="adapter", precision="bf16"), make_batch()
    train_once(policy, batch, lr=1.0)
    train_once(policy, batch, lr=1.0)
    before = snapshot(policy.actor.model)
    policy.save(tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in policy.actor.model.named_parameters())
    policy.restore()
    expected = unpacked_logits(policy.actor.model.eval(), batch)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(unpacked_logits(merged, batch), expected, atol=1e-4, rtol=0)
    base = policy.actor.model.unload()
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(unpacked_logits(again, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_saved_critic_gives_the_same_values(critic: Any, tmp_path: Path) -> None:
    policy, batch = Policy(make_model(), critic=critic), make_batch()
    train_once(policy, batch)
    train_once(policy, batch)
    policy.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = Policy(model, critic=critic)
    again.load_critic(tmp_path)
    values = [p.values(p.critic_hidden(batch, p.actor.hidden(batch))) for p in (policy, again)]
    assert torch.equal(*values) and values[0].abs().max() > 0
    if critic == "separate":
        trunk = AutoModel.from_pretrained(tmp_path / "critic").eval()
        hidden = trunk(batch.select([1]).input_ids.long()[None]).last_hidden_state[0]
        state = load_file(tmp_path / "critic" / "value_head.safetensors")
        begin, end = batch.cu_seqlens_host[1:3]
        expected = (hidden @ state["weight"].T + state["bias"])[:, 0]
        torch.testing.assert_close(values[0][begin:end], expected, atol=1e-5, rtol=0)


def test_separate_critic_of_a_lora_policy(tmp_path: Path) -> None:
    policy = Policy(make_lora(), critic="separate", reference="adapter")
    batch = make_batch()
    for _ in range(3):
        train_once(policy, batch, lr=0.5)
    policy.save(tmp_path)
    trunk = AutoModel.from_pretrained(tmp_path / "critic").eval()
    assert "lora" not in " ".join(trunk.state_dict())
    one = batch.select([2])
    hidden = trunk(one.input_ids.long()[None]).last_hidden_state[0]
    own = policy.critic_hidden(one, policy.actor.hidden(one))
    torch.testing.assert_close(own, hidden, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="cannot be loaded into a PEFT critic"):
        policy.load_critic(tmp_path)


def test_loading_a_critic_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^folder: .*got no file"):
        Policy(make_model()).load_critic(tmp_path)
