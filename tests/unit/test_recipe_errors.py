"""The table of wrong recipes and the message that each gives: one line with file, key, value, mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgmd_dist import registry
from sgmd_dist.errors import UserError
from sgmd_dist.recipe_file import load_recipe

GOOD = """
run: {name: good, steps: 10}
model: {family: wan, config: {num_layers: 2}}
objective: {name: sgmd}
data: {shards: some/folder}
"""

RUN_KEYS = "name, dir, seed, steps, resume, log_every"
SECTIONS = "run, model, objective, optim, data, parallel, checkpoint, samples, logging, health"
OBJECTIVES = ", ".join(registry.available(registry.OBJECTIVES))
FAMILIES = ", ".join(registry.available(registry.MODELS))
A_SCHEDULE = "{schedule: linear, from: 0.0, to: 0.1, steps: 500}"
SHARDS = "expected a folder, a pattern, prompts:FILE, world:moving_shapes, or a list of those"
BETAS = "expected two numbers in [0, 1), as in [0.0, 0.999]"
LR = "optim.generator.lr"
VIDEO_KEYS = "num_frames, height, width"
STEPS = "expected the first and the last step, counted from 1, as in [10, 12], or null"
DP_SHARD = "expected -1 (the ranks that the other axes leave) or an integer >= 1"

# (word on the command line, message after "command line: ")
WRONG_VALUES = [
    # keys
    ("run.stpes=5", f"run.stpes = 5: unknown key; allowed: {RUN_KEYS}; did you mean 'steps'?"),
    ("run.zzz='x'", f"run.zzz = 'x': unknown key; allowed: {RUN_KEYS}"),
    ("run={1: 2}", f"run.1: unknown key; allowed: {RUN_KEYS}"),
    ("optimizer.lr=1", f"optimizer: unknown key; allowed: {SECTIONS}; did you mean 'optim'?"),
    ("steps=5", f"steps = 5: unknown key; allowed: {SECTIONS}; did you mean 'run.steps'?"),
    ("data.video.heigth=3", f"data.video.heigth = 3: unknown key; allowed: {VIDEO_KEYS}; did you mean 'height'?"),
    # integers
    ("run.steps=0", "run.steps = 0: expected an integer >= 1"),
    ("run.steps=1.5", "run.steps = 1.5: expected an integer >= 1"),
    ("run.steps=many", "run.steps = 'many': expected an integer >= 1"),
    ("run.steps=true", "run.steps = true: expected an integer >= 1"),
    ("run.steps=null", "run.steps = null: expected an integer >= 1"),
    ("run.steps=", "run.steps = null: expected an integer >= 1"),
    ("run.steps=[1]", "run.steps = [1]: expected an integer >= 1"),
    ("run.steps.x=1", 'run.steps = {"x": 1}: expected an integer >= 1, not a section'),
    ("run.seed=-1", "run.seed = -1: expected an integer >= 0 and < 9223372036854775808"),
    ("data.threads=9", "data.threads = 9: expected an integer >= 1 and <= 8"),
    ("model.config.num_layers=0", "model.config.num_layers = 0: expected an integer >= 1"),
    (
        "model.config.attention_head_dim=7",
        "model.config.attention_head_dim = 7: expected an even integer >= 6: rotary embedding turns pairs of numbers",
    ),
    # numbers
    ("optim.generator.weight_decay=-1", "optim.generator.weight_decay = -1: expected a number >= 0"),
    ("optim.generator.eps=0", "optim.generator.eps = 0: expected a number > 0"),
    ("optim.generator.eps=.inf", "optim.generator.eps = Infinity: expected a number > 0"),
    ("optim.generator.eps=tiny", "optim.generator.eps = 'tiny': expected a number > 0"),
    ("optim.schedule.final_ratio=2", "optim.schedule.final_ratio = 2: expected a number >= 0 and <= 1"),
    # text, booleans, names
    ("run.name=5", "run.name = 5: expected text; quote it to make it text"),
    ("run.name=[a]", 'run.name = ["a"]: expected text'),
    ("parallel.compile=maybe", "parallel.compile = 'maybe': expected true or false"),
    (
        "model.compute_dtype=fp16",
        "model.compute_dtype = 'fp16': expected one of bfloat16, float32; did you mean 'bfloat16'?",
    ),
    (
        "model.teacher.dtype=f32",
        "model.teacher.dtype = 'f32': expected one of bfloat16, float32 or null; did you mean 'float32'?",
    ),
    # adapters
    ("model.generator.lora.rank=0", "model.generator.lora.rank = 0: expected an integer >= 1"),
    ("model.fake_score.lora.alpha=0", "model.fake_score.lora.alpha = 0: expected a number > 0 or null"),
    ("model.generator.lora=8", "model.generator.lora = 8: expected a section with keys rank, alpha, targets or null"),
    (
        "model.generator.lora.targets=[]",
        "model.generator.lora.targets = []: expected a list of layers, as in [to_q, to_k]",
    ),
    (
        "model.generator.lora.dropout=0.1",
        "model.generator.lora.dropout = 0.1: unknown key; allowed: rank, alpha, targets",
    ),
    ("model.teacher.lora.rank=4", "model.teacher.lora: unknown key; allowed: pretrained, dtype"),
    (
        "objective.inner_sample=resue",
        "objective.inner_sample = 'resue': expected one of fresh, reuse; did you mean 'reuse'?",
    ),
    (
        "parallel.activation_checkpointing=true",
        "parallel.activation_checkpointing = true: expected one of none, block, selective",
    ),
    (
        "model.generator.dtype=bfloat16",
        "model.generator.dtype = 'bfloat16': expected float32: a trained role keeps float32 master weights and"
        " computes in model.compute_dtype",
    ),
    (
        "model.config.qk_norm=rms_norm",
        "model.config.qk_norm = 'rms_norm': expected one of rms_norm_across_heads or null; did you mean"
        " 'rms_norm_across_heads'?",
    ),
    # lists
    ("optim.generator.betas=[0.9]", f"optim.generator.betas = [0.9]: {BETAS}"),
    ("optim.generator.betas=0.9", f"optim.generator.betas = 0.9: {BETAS}"),
    ("optim.generator.betas=[0.9, x]", f'optim.generator.betas = [0.9, "x"]: {BETAS}'),
    ("optim.generator.betas=[0.9, 1.0]", f"optim.generator.betas = [0.9, 1.0]: {BETAS}"),
    ("model.config.patch_size=[1, 2]", "model.config.patch_size = [1, 2]: expected a list of 3 integers"),
    (
        "model.config.patch_size=[1, 0, 2]",
        "model.config.patch_size = [1, 0, 2]: expected three integers >= 1: frames, height and width of a patch",
    ),
    ("data.shards=null", f"data.shards = null: {SHARDS}"),
    ("data.shards=[]", f"data.shards = []: {SHARDS}"),
    ("data.shards=[1, a]", f'data.shards = [1, "a"]: {SHARDS}'),
    # sections
    ("run=5", f"run = 5: expected a section with keys {RUN_KEYS}"),
    ("run=null", f"run = null: expected a section with keys {RUN_KEYS}"),
    ("data.video=[1]", f"data.video = [1]: expected a section with keys {VIDEO_KEYS} or null"),
    (
        "optim.schedule=cosine",
        "optim.schedule = 'cosine': expected a section with keys name, warmup_steps, final_ratio",
    ),
    # plug-ins
    ("objective.name=sgdm", f"objective.name = 'sgdm': allowed: {OBJECTIVES}; did you mean 'sgmd'?"),
    ("objective.name=base", f"objective.name = 'base': allowed: {OBJECTIVES}"),
    ("objective.name=[sgmd]", f"objective.name = [\"sgmd\"]: allowed: {OBJECTIVES}; did you mean 'sgmd'?"),
    (
        "objective=sgmd",
        f"objective = 'sgmd': expected a section with the key 'name'; allowed: {OBJECTIVES}; did you mean 'sgmd'?",
    ),
    ("objective=null", f"objective.name: this key is required; allowed: {OBJECTIVES}"),
    ("model.family=wann", f"model.family = 'wann': allowed: {FAMILIES}; did you mean 'wan'?"),
    # schedules
    (f"{LR}=fast", f"{LR} = 'fast': expected a number or a schedule such as {A_SCHEDULE}"),
    (f"{LR}=null", f"{LR} = null: expected a number or a schedule such as {A_SCHEDULE}"),
    (f"{LR}=true", f"{LR} = true: expected a number or a schedule such as {A_SCHEDULE}"),
    (f"{LR}=[1]", f"{LR} = [1]: expected a number or a schedule such as {A_SCHEDULE}"),
    (f"{LR}=-1", f"{LR} = -1: expected a number > 0, at every step"),
    (f"{LR}=.nan", f"{LR} = NaN: expected a finite number"),
    ("objective.fake_updates=0.5", "objective.fake_updates = 0.5: expected a number >= 1, at every step"),
    ("objective.sigma_max=1.5", "objective.sigma_max = 1.5: expected a number >= 0 and <= 1, at every step"),
    (
        f"{LR}={{schedule: linear, from: 1, to: 0, steps: 9}}",
        f'{LR} = {{"schedule": "linear", "from": 1, "to": 0, "steps": 9}}: expected a number > 0, at every step',
    ),
    (
        f"{LR}={{schedule: linear, from: 1}}",
        f'{LR} = {{"schedule": "linear", "from": 1}}: a linear schedule lacks \'steps\' and lacks \'to\';'
        " its keys: from, start, steps, to",
    ),
    (
        f"{LR}={{schedule: piecewise, points: [[0, 1]], to: 2}}",
        f'{LR} = {{"schedule": "piecewise", "points": [[0, 1]], "to": 2}}: a piecewise schedule does not know'
        " 'to'; its keys: points",
    ),
    (
        f"{LR}={{schedule: step, to: 1}}",
        f'{LR} = {{"schedule": "step", "to": 1}}: expected \'schedule\' to be one of linear, cosine, piecewise,'
        f" as in {A_SCHEDULE}",
    ),
    (
        f"{LR}={{schedule: [linear]}}",
        f'{LR} = {{"schedule": ["linear"]}}: expected \'schedule\' to be one of linear, cosine, piecewise,'
        f" as in {A_SCHEDULE}",
    ),
    (f"{LR}={{schedule: linear, from: a, to: 1, steps: 5}}", f"{LR}.from = 'a': expected a number"),
    (f"{LR}={{schedule: linear, from: 1, to: 1, steps: 0}}", f"{LR}.steps = 0: expected an integer >= 1"),
    (
        f"{LR}={{schedule: piecewise, points: [[5, 1]]}}",
        f'{LR} = {{"schedule": "piecewise", "points": [[5, 1]]}}: expected points whose steps increase and begin'
        " at 0, as in [[0, 0.1], [1000, 0.05]]",
    ),
    (
        f"{LR}={{schedule: piecewise, points: [0, 1]}}",
        f"{LR}.points = [0, 1]: expected pairs of a step and a number, as in [[0, 0.1], [1000, 0.05]]",
    ),
    # parallel
    (
        "parallel.reshard_after_forward=1",
        "parallel.reshard_after_forward = 1: expected true, false, or a number of ranks >= 2",
    ),
    ("parallel.dp_shard=0", f"parallel.dp_shard = 0: {DP_SHARD}"),
    ("parallel.dp_shard=all", f"parallel.dp_shard = 'all': {DP_SHARD}"),
    # what is watched
    ("health.alarms.gap=1", "health.alarms.gap = 1: expected a number > 1 or null"),
    (
        "health.alarms=false",
        "health.alarms = false: expected a section with keys residual, gap, grad_norm, window, warmup, patience, stop"
        " or null",
    ),
    ("logging.profile.steps=[3, 2]", f"logging.profile.steps = [3, 2]: {STEPS}"),
    ("logging.profile.steps=[0, 2]", f"logging.profile.steps = [0, 2]: {STEPS}"),
    ("logging.profile.steps=3", f"logging.profile.steps = 3: {STEPS}"),
    ("logging.profile.ranks=[-1]", "logging.profile.ranks = [-1]: expected numbers of ranks, from 0, as in [0, 3]"),
    (
        "logging.wandb=films",
        "logging.wandb = 'films': expected a section with keys project, entity, group, tags, mode or null",
    ),
    # the words themselves
    ("run.steps", "'run.steps': expected key.sub=value, as in optim.generator.lr=1e-5"),
    ("=5", "'=5': expected key.sub=value, as in optim.generator.lr=1e-5"),
    ("run..x=5", "'run..x=5': expected key.sub=value, as in optim.generator.lr=1e-5"),
    ("base=x.yaml", "'base=x.yaml': 'base' belongs in a recipe file; give that recipe instead"),
    ("run.name='a", '"run.name=\'a": the value is not valid YAML: found unexpected end of stream'),
    (
        "run={steps: 1, steps: 2}",
        "'run={steps: 1, steps: 2}': the value is not valid YAML: the key 'steps' stands twice, first in line 1;"
        " remove one",
    ),
]

# (text of recipe.yaml, message after "recipe.yaml: "); {good} is a recipe beside it
WRONG_FILES = [
    ("", "the file is empty; expected sections such as 'run:' and 'model:'"),
    ("- a\n- b\n", "expected sections such as 'run:' and 'model:', found [\"a\", \"b\"]"),
    ("run: {name: x\n", "line 2, column 1: not valid YAML: expected ',' or '}', but got '<stream end>'"),
    ("run:\n\tname: x\n", "line 2, column 1: not valid YAML: found character '\\t' that cannot start any token"),
    ("a: 1\n---\nb: 2\n", "line 2, column 1: not valid YAML: but found another document"),
    (
        "run: !!python/object:os.system {}\n",
        "line 1, column 6: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'",
    ),
    (
        "run:\n  name: x\n  steps: 1\n  name: y\n",
        "line 4, column 3: the key 'name' stands twice, first in line 2; remove one",
    ),
    ("run: {}\nmodel: {}\nrun: {}\n", "line 3, column 1: the key 'run' stands twice, first in line 1; remove one"),
    ("base: [good.yaml]\n", 'base = ["good.yaml"]: expected the file name of another recipe'),
    ("base: gone.yaml\n", "base = 'gone.yaml': no such file gone.yaml; the name is relative to ."),
    (
        "base: recipe.yaml\n",
        "base = 'recipe.yaml': the recipes inherit from each other in a circle: recipe.yaml -> recipe.yaml",
    ),
    ("base: good.yaml\nrun: {steps: 0}\n", "run.steps = 0: expected an integer >= 1"),
    ("base: good.yaml\nrun:\n", f"run = null: expected a section with keys {RUN_KEYS}"),
    (GOOD.replace("{shards: some/folder}", "{}"), f"data.shards: this key is required; {SHARDS}"),
    (GOOD.replace("family: wan, ", ""), f"model.family: this key is required; allowed: {FAMILIES}"),
    (GOOD.replace("{name: sgmd}", "sgmd"), "objective = 'sgmd': expected a section with the key 'name'; allowed:"),
]


@pytest.fixture(autouse=True)
def _in_a_folder_with_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)


def message(path: str, *words: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, words)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_the_recipe_that_the_table_changes_is_good():
    assert load_recipe("good.yaml").run.steps == 10


@pytest.mark.parametrize("word, expected", WRONG_VALUES, ids=[word for word, _ in WRONG_VALUES])
def test_a_wrong_value_on_the_command_line(word: str, expected: str):
    assert message("good.yaml", word) == f"command line: {expected}"


@pytest.mark.parametrize("text, expected", WRONG_FILES)
def test_a_wrong_file(text: str, expected: str):
    Path("recipe.yaml").write_text(text)
    found = message("recipe.yaml")
    assert found.startswith(f"recipe.yaml: {expected}")
    assert found.endswith(expected) or expected.endswith("allowed:")


def test_a_missing_recipe_names_the_working_directory(tmp_path: Path):
    assert message("gone.yaml") == f"gone.yaml: no such recipe; the working directory is {tmp_path}"


def test_a_folder_is_no_recipe():
    assert message(".").startswith(".: cannot be read as a recipe: ")


def test_a_file_that_is_no_text_is_no_recipe():
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert message("binary.yaml").startswith("binary.yaml: cannot be read as a recipe: ")


def test_a_longer_circle_is_shown_whole():
    Path("a.yaml").write_text("base: b.yaml\n")
    Path("b.yaml").write_text("base: a.yaml\n")
    circle = "a.yaml -> b.yaml -> a.yaml"
    assert message("a.yaml") == f"b.yaml: base = 'a.yaml': the recipes inherit from each other in a circle: {circle}"


# Rules of a plug-in about several of its keys


@pytest.mark.parametrize(
    "word, rule",
    [
        (
            "objective.sigma_min=0.99",
            "objective: sigma_min reaches 0.99, sigma_max goes down to 0.98: expected sigma_min <= sigma_max at every"
            " step",
        ),
        (
            "objective.exit_draw=stratified",
            "objective: exit_draw = stratified, exit_groups = 1: expected at least 4 groups, one for each step at which"
            " a rollout may exit; or set exit_draw to independent",
        ),
        (
            "objective.exit_weights=[1,1,2]",
            "objective: exit_weights = [1.0, 1.0, 2.0]: expected 4 numbers, one for each of student_steps, the"
            " last above 0, since samples leave the chain there",
        ),
        (
            "objective.exit_weights=[1,1,2,0]",
            "objective: exit_weights = [1.0, 1.0, 2.0, 0.0]: expected 4 numbers, one for each of student_steps, the"
            " last above 0, since samples leave the chain there",
        ),
        (
            "model.config.in_channels=48",
            "model.config: in_channels = 48, out_channels = 16: expected equal numbers, or in_channels = 36 for image"
            " to video: latents, a mask of 4, latents of the image",
        ),
    ],
)
def test_a_broken_rule_names_the_section(word: str, rule: str):
    assert message("good.yaml", word) == f"command line: {rule}"


# Which file a value comes from


def test_a_wrong_value_of_the_base_names_the_base():
    Path("bad_base.yaml").write_text(GOOD.replace("steps: 10", "steps: -3"))
    Path("child.yaml").write_text("base: bad_base.yaml\nrun: {name: child}\n")
    assert message("child.yaml") == "bad_base.yaml: run.steps = -3: expected an integer >= 1"
    assert message("child.yaml", "run.steps=-4") == "command line: run.steps = -4: expected an integer >= 1"


def test_a_wrong_value_of_a_child_names_the_child():
    Path("child.yaml").write_text("base: good.yaml\noptim: {generator: {betas: [1]}}\n")
    assert message("child.yaml", "run.steps=5") == f"child.yaml: optim.generator.betas = [1]: {BETAS}"


def test_a_wrong_schedule_names_the_file_that_wrote_the_wrong_part():
    ramp = "{schedule: linear, from: 0.0, to: 0.1, steps: 5}"
    Path("base.yaml").write_text(GOOD.replace("name: sgmd", f"name: sgmd, nr_weight: {ramp}"))
    Path("child.yaml").write_text("base: base.yaml\nobjective: {nr_weight: {steps: none}}\n")
    assert message("child.yaml") == "child.yaml: objective.nr_weight.steps = 'none': expected an integer >= 1"


# Several at once


def test_all_mistakes_are_reported_together():
    Path("recipe.yaml").write_text(GOOD.replace("steps: 10", "stpes: 10").replace("some/folder", "[]"))
    assert message("recipe.yaml", "parallel.dp_shard=0", "objective.name=sgdm") == (
        f"4 mistakes: [1] command line: objective.name = 'sgdm': allowed: {OBJECTIVES}; did you mean 'sgmd'?"
        f" [2] recipe.yaml: run.stpes = 10: unknown key; allowed: {RUN_KEYS}; did you mean 'steps'?"
        f" [3] recipe.yaml: data.shards = []: {SHARDS}"
        f" [4] command line: parallel.dp_shard = 0: {DP_SHARD}"
    )


def test_keys_of_an_unknown_objective_are_not_judged():
    assert message("good.yaml", "objective.name=gan", "objective.margin=1") == (
        f"command line: objective.name = 'gan': allowed: {OBJECTIVES}"
    )


def test_a_long_value_is_cut():
    text = message("good.yaml", f"run.steps={'x' * 500}")
    assert text == f"command line: run.steps = '{'x' * 79}...: expected an integer >= 1"
