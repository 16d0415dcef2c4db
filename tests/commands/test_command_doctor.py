import pytest
import torch
from packaging.version import Version

from deltatune import CompileOptions
from deltatune.cli import main
from deltatune.commands import doctor, prebuild
from deltatune.config.load import load_recipe
from deltatune.training import planned
from deltatune.training.adapters import adapt
from tiny import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("versions", "named"),
    [
        ({"torch": "2.13.0", "transformers": "5.23.0"}, None),
        ({"torch": "2.10.1", "transformers": "5.23.0"}, "torch>=2.11"),
        ({"torch": "2.13.0", "transformers": "5.16.2"}, "transformers>=5.17"),
    ],
)
def test_known_problems(versions, named) -> None:
    problems = doctor.known_problems({name: Version(version) for name, version in versions.items()}, None)
    assert len(problems) == (named is not None)
    assert named is None or named in problems[0]


@pytest.mark.parametrize(
    ("installed", "capability", "found"),
    [(None, (9, 0), []), ("0.6.0", None, []), ("0.6.0", (7, 5), []), ("0.6.0", (9, 0), ["refused on sm90"])],
)
def test_an_fla_that_refuses_this_gpu_is_a_problem(monkeypatch, installed, capability, found) -> None:
    monkeypatch.setattr(doctor.fla, "refusal", lambda capability, dtype: "refused on sm{}{}".format(*capability))
    versions = {"fla": installed and Version(installed)}
    assert doctor.known_problems(versions, capability) == found


def test_doctor_shows_versions_and_kernels(capsys) -> None:
    assert main(["doctor", "--no-compile"]) == 0
    page = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in page
    assert "gated_delta_rule" in page
    assert "no known problem" in page


def test_a_compiler_that_fails_is_a_problem(capsys, monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand so on")

    monkeypatch.setattr(torch, "compile", broken)
    assert main(["doctor"]) == 1
    assert "torch.compile on cpu fails: no C++ compiler\n" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_built_and_it_says_so(capsys, monkeypatch, write_recipe) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = write_recipe()
    assert main(["doctor", "--no-compile", "--build", str(recipe)]) == 1
    page = capsys.readouterr().out
    assert "packs of 128 tokens: would train single steps" in page
    assert f"problem: --build {recipe} did nothing: no CUDA device" in page


def test_a_recipe_that_is_not_there_is_one_line(capsys, tmp_path) -> None:
    assert main(["doctor", "--build", str(tmp_path / "none.yaml")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "none.yaml" in captured.err


@pytest.mark.slow
def test_building_compiles_the_graphs_of_the_run(monkeypatch, write_recipe, tmp_path) -> None:
    """Of layers in front of the first adapter and behind it, which have graphs of their own."""
    tiny_model("qwen3", layers=4).save_pretrained(tmp_path / "deep")
    prepared = []

    def recorded(*args, **options):
        prepared.append(planned.prepare_by_recipe(*args, **options))
        return prepared[-1]

    monkeypatch.setattr(prebuild, "prepare_by_recipe", recorded)
    monkeypatch.setattr(planned, "compile_options", lambda recipe: CompileOptions(backend="aot_eager"))
    sections = {"model": {"name_or_path": str(tmp_path / "deep")}, "compile": True, "checkpointing": "auto"}
    sections["lora"] = {"r": 4, "target_modules": r".*layers\.[123]\..*q_proj"}
    recipe = load_recipe(write_recipe(**sections)).recipe
    built = list(prebuild.build(recipe, CPU))
    assert [step for step, _ in built] == ["a step, 1 document"]
    assert all(seconds > 0 for _, seconds in built)
    found = prepared[-1].report
    assert found.checkpointing == "none"
    assert found.compile_report.breaks == []

    # the run's own model, at its own depth
    model = adapt(tiny_model("qwen3", layers=4), recipe.lora)
    whole = planned.prepare_by_recipe(recipe, model.train())
    prebuild._seconds(model, prebuild._batch(recipe, model.config, 1, CPU), None)
    assert found.compile_report.graphs == whole.compile_report.graphs
    assert len(found.compile_report.graphs) == 2


def test_evaluation_is_built_where_the_recipe_evaluates(write_recipe) -> None:
    recipe = load_recipe(write_recipe()).recipe
    data = recipe.data.model_copy(update={"eval": recipe.data.train})
    found = prebuild.build(recipe.model_copy(update={"data": data}), CPU)
    assert [step for step, _ in found] == ["a step, 1 document", "evaluation"]


@pytest.mark.parametrize(("loss", "built"), [("dpo", ["the reference"]), ("simpo", [])])
def test_a_reference_is_built_where_the_loss_has_one(write_recipe, pairs, loss, built) -> None:
    recipe = load_recipe(write_recipe(pairs, preference={"loss": loss})).recipe
    assert [step for step, _ in prebuild.build(recipe, CPU)] == ["a step, 1 document", *built]


@pytest.mark.parametrize(
    ("kinds", "depth"),
    [(["linear", "linear", "linear", "full"] * 6, 8), (["full"] * 12, 2), (["linear", "full"], 2), (None, 2)],
)
def test_a_shallow_model_holds_every_kind_of_layer_twice(kinds, depth) -> None:
    class Config:
        num_hidden_layers = len(kinds or range(12))
        layer_types = kinds

        def get_text_config(self):
            return self

    found = prebuild.shallow(Config())
    assert found.num_hidden_layers == depth
    assert found.layer_types == (kinds and kinds[:depth])


@pytest.mark.parametrize("heads", [16, 32, 48])
@pytest.mark.parametrize("processors", [132, 148])
def test_document_counts_meet_every_kernel_of_flash_qla(monkeypatch, heads, processors) -> None:
    class Properties:
        multi_processor_count = processors

    class Config:
        linear_num_value_heads = heads

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)

    def block(documents: int) -> int:
        """As FlashQLA 0.1.3 chooses: 70% of the processors should have a block of their own."""
        wanted = int(0.7 * processors)
        return 128 if documents * heads >= wanted else 64 if 2 * documents * heads >= wanted else 32

    counts = prebuild.document_counts(Config(), torch.device("cuda"))
    assert {block(count) for count in counts} == {block(count) for count in range(1, 200)}


def test_attention_alone_needs_one_count_of_documents() -> None:
    assert prebuild.document_counts(object(), torch.device("cuda", 0) if torch.cuda.is_available() else CPU) == [1]
