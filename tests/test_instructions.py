"""Instruction tuning: what is learned, what a loss counts, what is written, and that a tiny model learns an answer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from adalora.errors import ConfigError, DataError
from adalora.recipe import Recipe, load_recipe
from adalora.tasks.causal import final_answer, normal_form, require_isolation, row_losses
from adalora.tasks.chat import IGNORED, ChatFormat, Encoded, blocks, packed
from adalora.tasks.instructions import InstructionsTask, build_task, without_data
from adalora.train import run
from folders import assert_check_agrees
from tiny import peft_warnings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As reasoning models do: earlier answers lose their thoughts, here their first letter.
FORGETFUL = CHATML.replace(
    "{{ m.content }}",
    "{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}{{ m.content[1:] }}{% endif %}",
)
COLOURS = {"cat": "black", "dog": "brown", "hen": "white", "cow": "red", "fox": "orange", "pig": "pink"}
CORPUS = [f"What colour is the {animal}? It is {colour}.\n\n#### {len(colour)}" for animal, colour in COLOURS.items()]
HIDDEN = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def save_tokenizer(folder: Path, template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained here, in which `abcd` is one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*CORPUS * 5, *["abcd"] * 20, "user assistant system"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=special[2:],
        chat_template=template,
        model_max_length=128,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def config(kind: str, size: int = 420) -> Any:
    if kind == "gpt2":
        return GPT2Config(vocab_size=size, n_embd=48, n_layer=2, n_head=4, n_positions=128, initializer_range=0.4)
    chosen = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind]
    return chosen(
        vocab_size=size,
        max_position_embeddings=128,
        num_key_value_heads=2,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=1,
        **HIDDEN,
    )


CLASSES = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}


def save_model(folder: Path, kind: str = "llama", template: str | None = None) -> Path:
    size = len(save_tokenizer(folder, template))
    torch.manual_seed(0)
    CLASSES[kind](config(kind, size)).save_pretrained(folder)
    return folder


def questions(count: int) -> list[dict[str, str]]:
    animals = list(COLOURS)
    chosen = [animals[i % len(animals)] for i in range(count)]
    return [
        {"prompt": f"What colour is the {a}?", "completion": f"It is {COLOURS[a]}.\n\n#### {len(COLOURS[a])}"}
        for a in chosen
    ]


def chats(count: int) -> list[dict[str, Any]]:
    pairs = [(row["prompt"], row["completion"]) for row in questions(2 * count)]
    return [
        {
            "messages": [
                {"role": role, "content": text}
                for question, answer in pairs[2 * i : 2 * i + 2]
                for role, text in (("user", question), ("assistant", answer))
            ]
        }
        for i in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder)
    write(folder / "pairs.jsonl", questions(24))
    write(folder / "few.jsonl", questions(7))
    write(folder / "chats.jsonl", chats(6))
    write(folder / "texts.jsonl", [{"text": text} for text in CORPUS])
    return folder


def recipe(folder: Path, *settings: str, file: str = "pairs") -> Recipe:
    kind = {"chats": "messages", "texts": "text"}.get(file, "pairs")
    path = folder / "recipe.yaml"
    path.write_text(
        f"task: causal-lm\nmodel: {{name_or_path: {folder}}}\n"
        f"data: {{train: {folder / file}.jsonl, validation: {folder / file}.jsonl, kind: {kind}, max_length: 96, "
        "max_new_tokens: 24}\nmethod: {name: adalora, init_r: 8, target_r: 4}\n"
    )
    return load_recipe(str(path), settings)


def task(folder: Path, *settings: str, file: str = "pairs") -> InstructionsTask:
    return build_task(str(folder), recipe(folder, *settings, file=file))


def learned(built: InstructionsTask, row: dict[str, Any]) -> str:
    kept = [label for label in row["labels"] if label != IGNORED]
    return str(built.processor.decode(kept))


def test_of_a_pair_exactly_the_completion_and_the_end_are_learned(folder: Path) -> None:
    built = task(folder)
    row, raw = built.splits["train"][1], questions(2)[1]
    assert built.processor.decode(row["input_ids"]) == f"{raw['prompt']}\n\n{raw['completion']}<end>"
    assert learned(built, row) == raw["completion"] + "<end>"
    first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    assert row["input_ids"][:first] == built.format.tokens(built.format.prompt(raw, ""))
    assert "24 train, 24 validation rows" in built.describe()
    assert "'What colour is the cat?\\n\\n' → 'It is black.\\n\\n#### 5<end>'" in built.describe()


def test_an_input_stands_between_prompt_and_completion(folder: Path) -> None:
    rows = [
        {"prompt": "Add.", "more": "1 2", "completion": "3"},
        {"prompt": "Add.", "more": "", "completion": "0"},
        {"prompt": "Add.", "more": None, "completion": "0"},
    ]
    write(folder / "more.jsonl", rows)
    built = task(folder, "data.input=more", file="more")
    texts = [built.processor.decode(row["input_ids"]) for row in built.splits["train"]]
    assert texts == ["Add.\n\n1 2\n\n3<end>", "Add.\n\n0<end>", "Add.\n\n0<end>"]


def test_without_completion_only_all_but_the_first_token_is_learned(folder: Path) -> None:
    row = task(folder, "data.completion_only=false").splits["train"][0]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_of_a_chat_exactly_the_answers_are_learned(folder: Path) -> None:
    built = task(folder, f"data.chat_template='{CHATML}'".replace("\n", "\\n").replace("'", '"'), file="chats")
    row, messages = built.splits["train"][0], chats(1)[0]["messages"]
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert built.processor.decode(row["input_ids"]) == text
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert learned(built, row) == "".join(answer + "<|im_end|>\n" for answer in answers)
    # What ends an answer in this template ends generation too, though it is not the end token.
    assert built.processor.convert_ids_to_tokens(built.format.stop_ids()) == ["<end>", "<|im_end|>"]


def test_the_tokenizers_own_template_serves_chats_and_pairs(tmp_path: Path) -> None:
    save_model(tmp_path, template=CHATML)
    write(tmp_path / "pairs.jsonl", questions(3))
    built = task(tmp_path)
    start = "<|im_start|>user\nWhat colour is the cat?<|im_end|>\n<|im_start|>assistant\n"
    assert built.processor.decode(built.splits["train"][0]["input_ids"]).startswith(start + "It is black.")
    assert built.format.prompt({"prompt": "What colour is the cat?"}, "") == start
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    write(tmp_path / "chats.jsonl", [chat] * 3)
    other = task(tmp_path, file="chats")
    assert other.format.prompt(chat, "") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert other.format.prompt({"prompt": "Hi"}, "") == other.format.prompt(chat, "")
    assert other.format.reference(chat) == "Ho"


def test_a_begin_token_stands_once_and_only_where_the_tokenizer_has_one(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.bos_token = "<|im_start|>"
    assert ChatFormat(recipe(tmp_path).data, tokenizer, "m").begin == ""  # named, but never put in front
    inner = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", inner.token_to_id("<|im_start|>"))]
    )
    begins = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<end>")
    plain = ChatFormat(recipe(tmp_path).data, begins, "m")
    row = {"prompt": "cat", "completion": "dog"}
    encoded = plain.encode(plain.parts(row, ""))
    assert begins.decode(encoded.ids) == "<|im_start|>cat\n\ndog<end>"
    assert begins.decode([label for label in encoded.labels if label != IGNORED]) == "dog<end>"


@pytest.mark.parametrize(
    "settings,message",
    [
        ([], "has no chat template. Give one with data.chat_template"),
        (["data.chat_template=nowhere.jinja"], "neither a Jinja template nor a file"),
        (["data.answer_pattern='('"], "data.answer_pattern is '\\(', which is no regular expression"),
        (["metric=exact_match"], "only with data.evaluate_generation=true"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(folder: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(folder, *settings, file="chats")


@pytest.mark.parametrize("key,why", [("packing", "joined into blocks anyway"), ("evaluate_generation", "no answers")])
def test_what_does_nothing_for_plain_texts_is_refused(folder: Path, key: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        task(folder, f"data.{key}=true", file="texts")


def turn(role: str, content: object = "a") -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "template,messages,message",
    [
        (CHATML, [turn("user")], "row 1: the chat holds no message of the role assistant"),
        (CHATML, [turn("assistant"), turn("user")], "row 1: the chat begins with an answer"),
        (CHATML, [], "row 1: column 'messages' must hold a list of messages"),
        (CHATML, [{"role": "user", "content": None}], "row 1: column 'messages' must hold"),
        (FORGETFUL, chats(1)[0]["messages"], "row 1: .* what stands before answer 2 differently once the chat goes on"),
        (
            "{{ raise_exception('roles') }}",
            chats(1)[0]["messages"],
            "row 0: the chat template cannot be applied: roles.",
        ),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_named(
    folder: Path, template: str, messages: list[dict[str, Any]], message: str
) -> None:
    good = {"messages": [turn("user"), turn("assistant")]}
    write(folder / "bad.jsonl", [good, {"messages": messages}])
    (folder / "chat.jinja").write_text(template)
    settings = [f"data.chat_template={folder / 'chat.jinja'}", "data.kind=messages"]
    with pytest.raises(DataError, match=message):
        task(folder, *settings, file="bad")


def test_where_a_token_reaches_over_the_boundary_the_parts_are_tokenized_apart(folder: Path) -> None:
    tokenizer = save_tokenizer(folder)
    chat = ChatFormat(recipe(folder).data, tokenizer, "m")
    one, two = chat.tokens("ab"), chat.tokens("cd")
    assert len(chat.tokens("abcd")) == 1
    assert chat.encode([("ab", False), ("cd", True)]) == Encoded(one + two, [IGNORED] * len(one) + two, merged=True)
    assert not chat.encode([("ab", False), (" It", True)]).merged


def test_what_is_cut_or_left_out_is_counted(folder: Path) -> None:
    long = {"prompt": "abcd", "completion": "abcd " * 60}
    hopeless = {"prompt": "x " * 60, "completion": "y"}
    write(folder / "long.jsonl", [*questions(3), long, hopeless, {"prompt": "ab\n\n", "completion": "\n\n"}])
    built = task(folder, "data.max_length=32", file="long")
    assert len(built.splits["train"]) == 5 and max(built.splits["train"]["length"]) == 32
    said = built.describe()
    assert "2 of 6 train rows cut to 32 tokens; 1 of 6 train rows left out, because nothing to learn fits" in said
    write(folder / "none.jsonl", [hopeless] * 2)
    with pytest.raises(DataError, match=r"no row has anything to learn within data\.max_length=32 tokens"):
        task(folder, "data.max_length=32", file="none")


def test_plain_texts_are_joined_into_blocks_and_no_token_is_lost(folder: Path) -> None:
    built = task(folder, "data.max_length=16", file="texts")
    lengths = built.splits["train"]["length"]
    assert set(lengths[:-1]) == {16} and 0 < lengths[-1] <= 16
    ids = [token for row in built.splits["train"] for token in row["input_ids"]]
    assert built.processor.decode(ids) == "".join(text + "<end>" for text in CORPUS)
    assert blocks([Encoded([1, 2], [1, 2]), Encoded([3], [3])], 2) == [
        Encoded([1, 2], [IGNORED, 2]),
        Encoded([3], [IGNORED]),
    ]


def test_packing_keeps_texts_whole_and_restarts_positions() -> None:
    texts = [Encoded(list(range(n)), [IGNORED] * n) for n in (3, 4, 2, 5)]
    rows = packed(texts, 7)
    assert [row["position_ids"] for row in rows] == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]]
    assert [row["length"] for row in rows] == [7, 7]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_packed_and_unpacked_rows_have_the_same_loss(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path, kind)
    write(tmp_path / "pairs.jsonl", questions(7))
    settings = recipe(tmp_path, "data.packing=true")
    built = build_task(str(tmp_path), settings)
    model = built.build_model(str(tmp_path), settings).eval()
    model.config.use_cache = False  # as the Trainer has it
    train, validation = built.splits["train"], built.splits["validation"]
    assert f"7 training texts packed into {len(train)} rows" in built.describe()
    assert len(train) < len(validation) == 7 and max(train["length"]) <= 96
    assert len(set(train["length"])) > 1  # so that one row is padded
    sums, gradients = [], []
    for rows in (train, validation):
        batch = built.collator([rows[i] for i in range(len(rows))])
        assert ("attention_mask" in batch) == (rows is validation)
        labels = batch["labels"]
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        total, count = row_losses(logits, labels).double().sum(0).tolist()
        assert loss.item() == pytest.approx(total / count, rel=1e-5)
        sums.append((total, count))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


def test_packing_is_refused_where_texts_would_see_one_another() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"data\.packing is true, but in 'm' \(BloomForCausalLM\) a text would see"):
        require_isolation(model, "m")


def trainer(built: InstructionsTask, model: Any, folder: Path, size: int) -> Trainer:
    arguments = TrainingArguments(
        str(folder / "out"), per_device_eval_batch_size=size, report_to="none", disable_tqdm=True, use_cpu=True
    )
    return Trainer(model, arguments, data_collator=built.collator, **built.trainer_options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_the_mean_over_tokens_whatever_the_batches(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path, kind)
    rows = [*questions(5), {"prompt": "a", "completion": "b " * 30}, {"prompt": "c", "completion": ""}]
    write(tmp_path / "odd.jsonl", rows)
    settings = recipe(tmp_path, file="odd")
    built = build_task(str(tmp_path), settings)
    model = built.build_model(str(tmp_path), settings).eval()
    total, count, batches = 0.0, 0, []
    for row in built.splits["validation"]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        learnt = int((labels != IGNORED).sum())
        loss = model(input_ids=ids, labels=labels).loss.item()
        total, count, batches = total + loss * learnt, count + learnt, [*batches, loss]
    for size in (1, 3, 7):
        worker = trainer(built, model, tmp_path, size)
        scores = built.evaluate(worker, "validation")
        assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
        assert scores["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
        # What a callback is told while training is the same number, not the Trainer's mean over batches.
        told = worker.evaluate(built.splits["validation"])
        assert told["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert abs(sum(batches) / len(batches) - total / count) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_of_unequal_length_are_answered_as_if_alone(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path, kind)
    settings = recipe(tmp_path)
    built = without_data(str(tmp_path), settings, [])
    model = built.build_model(str(tmp_path), settings).eval()
    rows = [{"prompt": "cat"}, {"prompt": "What colour is the dog? It is brown."}, {"prompt": "a b c"}]
    together = built.predict(model, rows)
    assert together == [built.predict(model, [row])[0] for row in rows]
    assert len({answer["text"] for answer in together}) == 3
    with pytest.raises(DataError, match=r"row 1: there is no text in 'prompt'; the keys are text"):
        built.predict(model, [rows[0], {"text": "a"}])
    with pytest.raises(
        DataError, match=r"the input, row 0: a prompt of \d+ tokens and data\.max_new_tokens=24 are more"
    ):
        built.predict(model, [{"prompt": "a b c d e f " * 20}])


@pytest.mark.parametrize(
    "answer,form",
    [
        ("$1,234.50", "1234.5"),
        ("1234.500", "1234.5"),
        ("100", "100"),
        ("1e3", "1000"),
        ("-0", "0"),
        (" 18. ", "18"),
        ("$ 5", "5"),
        ("Forty  Two", "forty two"),
        ("nan", "nan"),
        ("", ""),
    ],
)
def test_numbers_have_one_form(answer: str, form: str) -> None:
    assert normal_form(answer) == form


def test_the_final_answer_is_the_last_match() -> None:
    assert final_answer("#### 3\nno, #### 4,000", "#### (.+)") == "4000"
    assert final_answer("so 3 or 4", r"\d+") == "4"
    assert final_answer("nothing", r"\d+") is None
    assert final_answer(" Yes ", None) == "yes"


def test_a_reference_without_final_answer_is_refused(folder: Path) -> None:
    write(folder / "unsolved.jsonl", [*questions(1), {"prompt": "a", "completion": "no number"}])
    settings = ["data.evaluate_generation=true", "data.answer_pattern='#### (.+)'"]
    with pytest.raises(DataError, match=r"finds nothing in the reference of 1 of 2 rows, the first is row 1"):
        task(folder, *settings, file="unsolved")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    LlamaForCausalLM(config("llama", len(tokenizer) // 2 + 20)).save_pretrained(tmp_path)
    write(tmp_path / "pairs.jsonl", questions(4))
    settings = recipe(tmp_path)
    with pytest.raises(ConfigError, match="the tokenizer files are of another model"):
        build_task(str(tmp_path), settings).build_model(str(tmp_path), settings)


def test_a_check_prints_the_recipe_of_the_run(folder: Path, tmp_path: Path) -> None:
    settings = ["training.max_steps=1", "training.load_best_model_at_end=true"]
    assert_check_agrees(recipe(folder, *settings, file="texts"), tmp_path)


@pytest.mark.parametrize("kind,packing", [("llama", "true"), ("gpt2", "false")])
@pytest.mark.slow
def test_a_tiny_model_learns_its_answers(tmp_path: Path, kind: str, packing: str) -> None:
    save_model(tmp_path, kind)
    write(tmp_path / "pairs.jsonl", questions(24))
    write(tmp_path / "few.jsonl", questions(6))
    settings = [
        f"data.packing={packing}",
        f"data.validation={tmp_path / 'few.jsonl'}",
        "data.evaluate_generation=true",
        "data.answer_pattern='#### (.+)'",
        "metric=exact_match",
        "training.num_train_epochs=60",
        "training.learning_rate=2e-2",
        "training.per_device_train_batch_size=4",
    ]
    result = run(recipe(tmp_path, *settings), tmp_path / "out", Console(quiet=True))
    assert result.scores["exact_match"] == 1.0
    assert result.scores["loss"] < 0.1
    assert result.scores["perplexity"] == pytest.approx(torch.tensor(result.scores["loss"]).exp().item(), rel=1e-4)
    answers = result.task.predict(result.model, [{"prompt": "What colour is the fox?"}])
    assert answers == [{"text": "It is orange.\n\n#### 6", "answer": "6"}]


@pytest.mark.slow
def test_lora_by_peft_trains_and_answers_too(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2", template=CHATML)
    write(tmp_path / "chats.jsonl", chats(12))
    settings = [
        "method={name: lora, r: 4}",
        "data.packing=true",
        "training.num_train_epochs=20",
        "training.learning_rate=2e-2",
        "training.per_device_train_batch_size=2",
    ]
    with peft_warnings():
        result = run(recipe(tmp_path, *settings, file="chats"), tmp_path / "out", Console(quiet=True))
        answer = result.task.predict(result.model, [{"prompt": "What colour is the cat?"}])
    assert result.scores["loss"] < 0.1
    assert answer == [{"text": "It is black.\n\n#### 5"}]
    kept = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out" / "adapter")
    assert kept.chat_template == CHATML
