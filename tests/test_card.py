"""The program in a model card, for each task: it is complete, and it fits the task."""

import pytest

from adalora.card import CardFacts, loading_code, model_card
from adalora.methods.base import ParameterCount
from adalora.recipe import load_recipe

TASKS = {
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
    "token-classification": ("token-classification", "AutoModelForTokenClassification"),
    "question-answering": ("question-answering", "AutoModelForQuestionAnswering"),
    "seq2seq": ("summarization", "AutoModelForSeq2SeqLM"),
    "causal-lm": ("text-generation", "AutoModelForCausalLM"),
    "image-classification": ("image-classification", "AutoModelForImageClassification"),
}


def facts(labels: list[str]) -> CardFacts:
    count = ParameterCount(20, 10, 4)
    return CardFacts("some/model", labels, {"train": 8, "test": 2}, "test", {"f1": 0.5}, count, 3, None)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_each_task_has_a_card_with_a_complete_program(task: str, method: str) -> None:
    settings = [
        f"task={task}",
        "data={train: a.jsonl}",
        f"method={{name: {method}}}",
        "model={name_or_path: some/model}",
    ]
    recipe = load_recipe("text-classification", settings)
    labels = ["a", "b"] if "classification" in task else []
    card, program = model_card(recipe, facts(labels), None), loading_code(recipe, facts(labels))
    pipeline, auto = TASKS[task]
    assert f"pipeline_tag: {pipeline}" in card and program in card
    assert f"base = {auto}.from_pretrained(" in program and ("num_labels=2" in program) == bool(labels)
    assert ("adalora.load_adapter" in program) == (method == "adalora")
    compile(program, "card", "exec")
    name = "imageprocessor" if "image" in task else "tokenizer"
    assert f"{name} = Auto" in program and f"{name}(" in program
    assert "It predicts one number." not in card


def test_changed_entries_of_the_configuration_are_in_the_program() -> None:
    settings = ["model={name_or_path: some/model, config: {cls_dropout: 0.15}, revision: v1}"]
    program = loading_code(load_recipe("text-classification", settings), facts([]))
    assert "vars(config).update({'cls_dropout': 0.15})" in program
    assert "from_pretrained('some/model', config=config)" in program and 'problem_type="regression"' in program
    compile(program, "card", "exec")
