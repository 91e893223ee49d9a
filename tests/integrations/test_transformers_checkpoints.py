"""A saved model records its attention, and is loaded with the same attention or not at all."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from race_dist.integrations.transformers import RaceSelfAttention, convert, from_pretrained
from tests.integrations.hf_models import GROUPED, SIZES, build, tokens

BARE = {"qk_norm": False, "train_beta": False, "decay": "none", "short_conv": 0, "num_planes": 3, "seed": 7}  # adds no weights
KINDS = ("race", "options", "converted", "bare", "hybrid")


def make(kind: str) -> Any:
    if kind == "race":
        return build("llama", implementation="race")
    if kind == "options":
        return build("llama", implementation="race", race_attention={"options": {"num_tables": 2, "beta_init": 3.0, "seed": 5}})
    return convert(build("llama"), layers=[1] if kind == "hybrid" else None, race=BARE if kind == "bare" else {"seed": 3})


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(tokens(2, 10) if ids is None else ids, use_cache=False).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """The folder and the model of each kind."""
    found = {}
    for kind in KINDS:
        model, folder = make(kind), tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        found[kind] = folder, model
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_load_gives_the_model_that_was_saved(kind: str, saved: Any, tmp_path: Path) -> None:
    folder, model = saved[kind]
    expected = logits(model)
    assert (expected - logits(build("llama"))).abs().max() > 1e-2  # softmax would be noticed
    ways = {
        "auto": lambda: hf.AutoModelForCausalLM.from_pretrained(folder),
        "ours": lambda: from_pretrained(folder),
        "class": lambda: hf.LlamaForCausalLM.from_pretrained(folder),
        "copy": lambda: copy.deepcopy(model),
        "info": lambda: hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)[0],
    }
    for name, way in ways.items():
        again = way().eval()
        assert torch.equal(logits(again), expected), name
        again.save_pretrained(tmp_path / name)
        assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()), expected), name
    base = hf.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = base(tokens(2, 10), use_cache=False).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_other_heads_and_new_models_have_the_attention_of_the_configuration(kind: str, saved: Any) -> None:
    folder, model = saved[kind]
    count = sum(isinstance(m, RaceSelfAttention) for m in model.modules())
    config = hf.AutoConfig.from_pretrained(folder)
    made = {
        "head": hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3),
        "new": hf.AutoModelForCausalLM.from_config(config),
        "constructor": hf.LlamaForCausalLM(copy.deepcopy(config)),
        "round trip": hf.LlamaForCausalLM(hf.LlamaConfig.from_dict(model.config.to_dict())),
        "JSON": hf.LlamaForCausalLM(hf.LlamaConfig.from_json_file(str(folder / "config.json"))),
    }
    for name, other in made.items():
        assert sum(isinstance(m, RaceSelfAttention) for m in other.modules()) == count, name
        assert other.config._attn_implementation == model.config._attn_implementation, name
        assert all(p.isfinite().all() for p in other.parameters()), name
    assert made["head"].score.weight.std() > 0  # transformers still initializes weights that are not in the checkpoint


def test_a_pipeline_and_a_trainer_keep_the_attention(saved: Any, tmp_path: Path) -> None:
    folder, model = saved["converted"]
    arguments = hf.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    hf.Trainer(model, arguments).save_model(str(tmp_path / "checkpoint-1"))
    expected = logits(model)
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").eval()), expected)
    from tokenizers import Tokenizer, models

    vocabulary = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")))
    made = hf.pipeline("text-generation", model=str(folder), tokenizer=tokenizer, device="cpu")
    assert torch.equal(logits(made.model.eval()), expected)


def test_a_run_is_not_resumed_with_another_attention(tmp_path: Path) -> None:
    """HF's Trainer loads only the weights into the given model."""
    rows = [{"input_ids": x, "labels": x} for x in tokens(2, 8)]

    def trainer(model: Any) -> Any:
        arguments = hf.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=1,
            save_steps=1,
            per_device_train_batch_size=2,
        )
        return hf.Trainer(model, arguments, train_dataset=rows)

    trainer(make("race")).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    trainer(make("race")).train(resume_from_checkpoint=checkpoint)
    for other, message in (
        (build("llama"), "attention race, but the model has softmax"),
        (make("options"), "with other settings: .*'seed': 0.*'seed': 5"),
        (make("bare"), "attention race, but the model has race_converted"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(other).train(resume_from_checkpoint=checkpoint)


PLAIN = """
import sys, transformers
transformers.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    for reader in (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.LlamaForCausalLM):
        try:
            reader.from_pretrained(folder)
        except ValueError as error:
            print("refused" if "race" in str(error) else error)
        else:
            print("softmax without a word")
assert not any(name.startswith("race_dist") for name in sys.modules)
"""


def test_without_this_package_transformers_refuses_the_checkpoint(saved: Any) -> None:
    folders = [str(folder) for folder, _ in saved.values()]
    done = subprocess.run([sys.executable, "-c", PLAIN, *folders], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["refused"] * 3 * len(folders)


@pytest.mark.parametrize("kind", KINDS)
def test_config_json_has_every_option(kind: str, saved: Any) -> None:
    from race_dist import RaceConfig

    folder, _ = saved[kind]
    entry = json.loads((folder / "config.json").read_text())["race_attention"]
    assert set(entry["options"]) == set(RaceConfig.model_fields) - {"dim", "num_heads", "num_kv_heads", "head_dim", "causal"}
    assert entry["layers"] == {"hybrid": [1], "converted": [0, 1], "bare": [0, 1]}.get(kind, [])
    assert entry["options"]["seed"] == {"options": 5, "converted": 3, "hybrid": 3, "bare": 7}.get(kind, 0)


def test_an_implementation_that_the_caller_names_comes_first(saved: Any) -> None:
    folder, model = saved["race"]
    for reader in (hf.AutoModelForCausalLM, hf.LlamaForCausalLM):
        softmax = reader.from_pretrained(folder, attn_implementation="sdpa").eval()
        assert torch.equal(logits(softmax), logits(build("llama")))
    folder, model = saved["hybrid"]
    eager = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager), logits(model), atol=1e-5, rtol=1e-5)


def test_a_model_that_was_switched_back_is_saved_as_softmax(tmp_path: Path) -> None:
    model = make("race")
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    assert "race" not in (tmp_path / "config.json").read_text()


def test_a_model_made_of_the_same_configuration_stays_softmax(tmp_path: Path) -> None:
    teacher = build("llama")
    student = hf.LlamaForCausalLM(teacher.config)
    convert(student)
    assert student.model.config is student.config
    teacher.save_pretrained(tmp_path)
    assert "race" not in (tmp_path / "config.json").read_text()
    assert not any(isinstance(m, RaceSelfAttention) for m in hf.AutoModel.from_pretrained(tmp_path).modules())


def test_a_sub_model_is_loaded_with_its_attention(tmp_path: Path) -> None:
    """A vision-language model in which only the text model is RACE."""
    text = hf.LlamaConfig(**SIZES | GROUPED)
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=96)
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "race"})
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.text_config._attn_implementation == "race"
    assert again.config.vision_config._attn_implementation == model.config.vision_config._attn_implementation != "race"
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed 3 there and 4 here"),
        ({"num_tables": 2}, "num_tables 4 there and 2 here"),
        ({"normalization": "bucket"}, "normalization 'global' there and 'bucket' here"),
        ({"num_planes": True}, r"config\.race_attention\.options: num_planes must be a whole number; got True"),
        ({"planes": 3}, "unknown key planes"),
        ({"backend": "reference"}, None),
    ],
)
def test_settings_that_are_not_those_of_the_weights_are_refused(
    change: dict[str, Any], message: str | None, saved: Any, tmp_path: Path
) -> None:
    folder, model = saved["converted"]
    data = json.loads((folder / "config.json").read_text())
    data["race_attention"]["options"] |= change
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    if message is None:  # the backend does not belong to the weights
        torch.testing.assert_close(logits(from_pretrained(tmp_path).eval()), logits(model), atol=1e-5, rtol=1e-5)
        return
    for reader in (hf.AutoModelForCausalLM.from_pretrained, from_pretrained):
        with pytest.raises(ValueError, match=message):
            reader(tmp_path)


def test_weights_of_a_layer_that_are_not_there_are_refused(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved["converted"]
    weights = {n: t for n, t in load_file(folder / "model.safetensors").items() if "layers.1.self_attn" not in n}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn: the checkpoint has no settings of this RACE layer"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["converted", "bare"])
def test_a_state_dict_records_the_settings(kind: str) -> None:
    model = make(kind)
    state = model.state_dict()
    make(kind).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"other settings of RACE: seed \d there and 9 here"):
        convert(build("llama"), race=(BARE if kind == "bare" else {}) | {"seed": 9}).load_state_dict(state)
    other = convert(build("llama"), race=(BARE if kind == "bare" else {"seed": 3}) | {"normalization": "bucket"})
    with pytest.raises(RuntimeError, match=r"other settings of RACE: normalization"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"race_settings"):
        build("llama").load_state_dict(state)


def test_a_softmax_configuration_does_not_make_softmax_of_converted_weights(saved: Any) -> None:
    for kind in ("converted", "bare", "hybrid"):
        for reader in (hf.AutoModelForCausalLM, hf.LlamaForCausalLM):
            with pytest.raises(ValueError, match=r"the checkpoint has RACE layers \(model\.layers\.\d\.self_attn"):
                reader.from_pretrained(saved[kind][0], config=build("llama").config)


def test_a_configuration_that_names_no_attention_does_not_make_softmax_of_race(saved: Any) -> None:
    folder, model = saved["race"]
    config = lambda: hf.LlamaConfig(**SIZES | GROUPED)
    for load in (hf.AutoModelForCausalLM, hf.LlamaForCausalLM):
        with pytest.raises(ValueError, match='has attn_implementation="race", but the given config names none'):
            load.from_pretrained(folder, config=config())
        again = load.from_pretrained(folder, config=hf.AutoConfig.from_pretrained(folder)).eval()
        assert torch.equal(logits(again), logits(model))
        asked = load.from_pretrained(folder, config=config(), attn_implementation="sdpa")
        assert asked.config._attn_implementation == "sdpa"


def test_a_configuration_that_names_layers_of_another_model_is_refused(saved: Any) -> None:
    config = hf.AutoConfig.from_pretrained(saved["converted"][0])
    config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"layers must be among 0 to 0"):
        hf.AutoModelForCausalLM.from_config(config)
    bert = hf.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, race_attention={"layers": [0]}
    )
    with pytest.raises(ValueError, match=r"race_attention says that layers \[0\] are RACE layers: BertModel has no list"):
        hf.BertModel(bert)


@pytest.mark.parametrize("path", ["nothing-here", ".", "", 3, None])
def test_a_path_without_a_model_is_refused_in_one_sentence(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match="path") as error:
        from_pretrained(path, local_files_only=True)
    assert "\n" not in str(error.value)


def test_options_are_checked_when_a_model_is_made() -> None:
    for options, message in (
        ({"num_planes": 0}, "num_planes must be from 1 to 10"),
        ({"decay": "token"}, "decay need parameters"),
        ({"betas": 2}, "unknown key betas"),
    ):
        with pytest.raises(ValueError, match=message):
            build("llama", implementation="race", race_attention={"options": options})
        model = build("llama", race_attention={"options": options})
        with pytest.raises(ValueError, match=message):
            model.set_attn_implementation("race")


def test_a_model_with_cross_attention_is_refused_for_it() -> None:
    sizes = {
        "vocab_size": 97,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }
    model = hf.BartForConditionalGeneration(hf.BartConfig(**sizes))
    with pytest.raises(ValueError, match="has cross attention"):
        model.set_attn_implementation("race")
    with pytest.raises(ValueError, match="has cross attention"):
        hf.BartForConditionalGeneration(hf.BartConfig(**sizes, attn_implementation="race"))
