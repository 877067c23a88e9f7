"""The model card: what it says of a version, with and without scores."""

import dataclasses

import mlflow
import pytest
from mlflow.artifacts import load_text

from steps.text2sql import model_card
from steps.text2sql.manifest import AdapterManifest
from steps.text2sql.model_card import Score

DESCRIBED = AdapterManifest(
    quantization="nf4",
    global_step=30,
    max_steps=500,
    dataset={
        "base_model": "owner/base@0123abc",
        "base_commit": "0123abc",
        "base_license": "\n   Apache License\n   Version 2.0, January 2004\n   http://www.apache.org/\n",
        "dataset": "owner/rows",
        "dataset_source": "https://hub/owner/rows",
        "dataset_commit": "4567def",
        "dataset_config": "",
        "dataset_split": "",
        "prompt_style": "plain",
        "dataset_digest": "ab" * 32,
        "tokenizer_fingerprint": "cd" * 32,
        "prompt_template": "{context} {question}",
        "max_length": 512,
        "split_by": "schema",
        "test_size": 0.2,
        "seed": 42,
        "counts": {"rows_train": 70, "rows_validation": 10, "rows_test": 20, "rejected_test_empty": 3},
    },
)
LORA = {
    "r": 32,
    "lora_alpha": 64.0,
    "lora_dropout": 0.05,
    "use_rslora": False,
    "target_modules": ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.v_proj"],
}
SCORES = {"execution_accuracy": Score(tuned=0.61, low=0.513, high=0.6996, base=0.02)}


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n\n")[1].split("\n## ")[0]


def test_a_scale_by_the_root_of_the_rank_is_said():
    recipe = section(model_card.render(DESCRIBED, LORA | {"use_rslora": True}, name="text2sql"), "Recipe")
    assert "dropout 0.05, rank-stabilized\n" in recipe
    assert "rank-stabilized" not in model_card.render(DESCRIBED, LORA, name="text2sql")


def test_a_correction_is_told_from_what_is_trained():
    corrected = dataclasses.replace(DESCRIBED, corrected=True)
    recipe = section(model_card.render(corrected, LORA, name="text2sql"), "Recipe")
    assert (
        "rank 32, alpha 64, dropout 0.05; half of the rank is trained, half takes back what nf4 changes\n"
        in recipe
    )
    assert "half of the rank" not in model_card.render(DESCRIBED, LORA, name="text2sql")


def test_it_names_data_base_licence_recipe_limits_and_use():
    card = model_card.render(DESCRIBED, LORA, name="text2sql")
    assert card.startswith("# text2sql\n")
    for words in (
        "`owner/base@0123abc`",
        "nf4",
        "licence: Apache License, Version 2.0, January 2004 (in full",
    ):
        assert words in section(card, "Base")
    for words in ("`owner/rows`", "commit 4567def", "70 train, 10 validation, 20 test", "split by schema"):
        assert words in section(card, "Data")
    for words in ("rank 32, alpha 64, dropout 0.05", "on q_proj, v_proj", "30 of 500 optimizer steps"):
        assert words in section(card, "Recipe")
    assert "may only read" in section(card, "Limits")
    assert 'mlflow.pyfunc.load_model("models:/text2sql@champion")' in section(card, "Use")


def test_its_first_line_tells_versions_apart():
    assert model_card.render(DESCRIBED, LORA, name="text2sql", version="7").startswith(
        "# text2sql version 7\n"
    )
    card = model_card.render(DESCRIBED, LORA, name="text2sql", version="7", scores=SCORES)
    assert card.startswith("# text2sql version 7 (execution_accuracy 61.0%)\n")


def test_the_card_of_a_version_says_how_to_use_that_version():
    use = section(model_card.render(DESCRIBED, LORA, name="text2sql", version="7"), "Use")
    assert use.count("models:/text2sql/7") == 3
    use = section(model_card.render(DESCRIBED, LORA, name="shop sql", version="7"), "Use")
    assert "`mlflow models serve -m 'models:/shop sql/7' --env-manager uv`" in use
    assert "champion" not in use


def test_without_scores_it_says_so():
    assert section(model_card.render(DESCRIBED, LORA, name="text2sql"), "Scores") == "Not evaluated yet.\n"


def test_scores_are_a_table_with_intervals_and_the_base_beside():
    named = {"scores": SCORES, "evaluated_rows": 100, "evaluation_run": "ab12"}
    scored = section(model_card.render(DESCRIBED, LORA, name="text2sql", **named), "Scores")
    assert scored.startswith("On 100 rows (in run ab12, with every prediction), greedy:")
    assert "| execution_accuracy&nbsp; | 2.0% | 61.0% | 51.3% to 70.0% |" in scored


@pytest.mark.parametrize("text", ["", "word " * 5000, "line\n" * 5000])
def test_a_licence_however_long_leaves_room_for_the_card_on_a_server(text):
    described = AdapterManifest(**vars(DESCRIBED) | {"dataset": DESCRIBED.dataset | {"base_license": text}})
    many = SCORES | {f"{i}_{'x' * 20}": SCORES["execution_accuracy"] for i in range(20)}
    card = model_card.render(described, LORA, name="text2sql", scores=many, evaluated_rows=100)
    assert len(card) < model_card.MAX_CHARACTERS


def test_a_card_with_very_long_paths_is_cut():
    dataset = DESCRIBED.dataset | {"base_model": f"/{'m' * 4000}", "dataset": f"/{'d' * 4000}"}
    described = AdapterManifest(**vars(DESCRIBED) | {"dataset": dataset})
    card = model_card.render(described, LORA, name="text2sql")
    assert len(card) < model_card.MAX_CHARACTERS
    assert card.endswith("…\n")


def test_the_versions_description_is_the_card_of_the_package_with_the_scores_of_its_evaluation(chain):
    version = mlflow.MlflowClient().get_model_version("text2sql", "1")
    packaged = load_text("models:/text2sql/1/README.md")
    assert packaged.startswith("# text2sql\n")
    assert "6 of 6 optimizer steps" in packaged
    before, after = section(packaged, "Scores"), section(version.description, "Scores")
    assert before == "Not evaluated yet.\n"
    named = packaged.replace("models:/text2sql@champion", "models:/text2sql/1")
    title = version.description.splitlines()[0]
    assert named.replace("# text2sql", title, 1).replace(before, after) == version.description
    # The newest evaluation: other tests score this version too.
    evaluated = mlflow.get_run(version.tags["evaluation_run_id"])
    metrics = evaluated.data.metrics
    row = [f"{metrics[name]:.1%}" for name in ("base_valid_sql", "valid_sql", "valid_sql_low")]
    assert f"| valid_sql&nbsp; | {row[0]} | {row[1]} | {row[2]} to {metrics['valid_sql_high']:.1%} |" in after
    assert (
        f"On {metrics['evaluated_rows']:.0f} rows (in run [{evaluated.info.run_id}](#/experiments/" in after
    )
