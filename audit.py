"""Are a run's checkpoints what was saved? Hashes every file, and checks that each state.json fits the run.

    python audit.py runs/demo         # one line per checkpoint; exit code 1 if one is damaged

It checks every checkpoint, also those set aside: the hash of each file, and of state.json in the ledger; the
numbers in state.json against config.json and dataset.json; the model's settings; and the shapes of weights
and moments. Reads the run folder; writes nothing.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import
    import configurator

    configurator.quiet_imports()

import json
import re
import sys
from pathlib import Path

import torch

import checkpoint
import configurator
import files
import integrity
from config import Config, ConfigError, load_run
from formats.families import end_of_text, hf_config, model_config, read_config, reader, settings
from formats.shards import open_weights
from model import Transformer
from run_folder import read, recorded, step_number


def audit(run: Path | str) -> bool:
    """Looks at every file of every checkpoint of a run and prints what it finds. True: all is well."""
    # Read the run's own description: the checkpoints are compared with it.
    run, good, bad = Path(run), [], 0
    cfg, manifest, sha256 = load_run(run), None, ""
    try:
        manifest = json.loads((run / "dataset.json").read_bytes())
        sha256 = files.sha256(run / "dataset.json")
    except (OSError, ValueError) as error:
        bad = 1
        configurator.show(f"dataset.json cannot be read ({error}), so no state.json is compared with it")

    # Check the checkpoints by step, complete or not.
    folders = [p for p in run.glob("checkpoints/*") if re.fullmatch(r"(incident-\d+-)?step-\d+", p.name)]
    in_ledger = recorded(run)
    for path in sorted(folders, key=lambda p: (step_number(p.name[p.name.index("step-") :]), p.name)):
        problems = problems_of(path, cfg, manifest, sha256)
        sizes = [file.stat().st_size for file in path.iterdir()]
        if problems:
            bad += 1
        elif path.name.startswith("step-"):
            good.append(path.name)
        unrecorded = ", and the ledger has no hash of its state.json" * (path.name not in in_ledger)
        for said in problems or [f"whole, {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB{unrecorded}"]:
            configurator.show(f"{path.name}  {'DAMAGED: ' * bool(problems)}{said}")
    configurator.show(f"the newest whole checkpoint is {good[-1]}" if good else "no checkpoint is whole")
    return bool(good) and not bad


def problems_of(path: Path, cfg: Config, manifest: dict | None, sha256: str) -> list[str]:
    """All that is wrong with a checkpoint's folder, [] where nothing is. Hashes every file in it."""
    # The files: their hashes are those that were recorded.
    try:
        c = read(path, None if path.name.startswith("incident-") else step_number(path.name))
    except ConfigError as error:
        return [str(error)]
    present = {file.name for file in path.iterdir()} - {"state.json"}
    problems = integrity.state_damage(c)
    problems += integrity.compare(c, sorted(present | set(c.state.get("files", {}))))

    # Their content: it fits the run, its dataset and its model.
    try:
        if manifest is not None:
            found = integrity.contradictions(c, cfg, manifest, sha256)
            problems += [f"state.json: {said}" for said in found]
        with torch.device("meta"):
            model = Transformer(cfg.model, None)
        if model_config(path) != settings(hf_config(cfg.model)).resolved():
            problems.append("config.json is of another model than the run's")
        if end_of_text(read_config(path)) != c.state.get("eot"):
            problems.append("config.json has another end-of-text token than state.json")
        reader(path, model)
        problems += strange_moments(path, model)
    except (ConfigError, KeyError, TypeError) as error:
        problems.append(f"{'' if isinstance(error, ConfigError) else 'dataset.json is damaged: '}{error}")
    return problems


def strange_moments(folder: Path, model: Transformer) -> list[str]:
    """How the optimizer's files differ from those of this model, by their headers; [] where they do not."""
    tensors, shapes = open_weights(folder, "optimizer"), {n: p.shape for n, p in model.named_parameters()}
    kept: dict[str, set] = {name: set() for name in shapes}
    for stored in tensors.keys() - {"random.cpu", "random.cuda"}:
        key, _, name = stored.partition(".")
        shape = tuple(tensors[stored].get_slice(stored).get_shape())
        if name not in shapes or shape != (() if key == "step" else shapes[name]):
            return [f"the optimizer's {stored} is {shape}, and the model has no parameter like it"]
        kept[name].add(key)
    lacks = [name for name in shapes if kept[name] not in map(set, checkpoint.MOMENTS.values())]
    if lacks and any(kept.values()):  # before the first update there are no moments at all
        return [f"the optimizer's state of {lacks[0]} is not whole"]
    return []


@configurator.script
def main() -> None:
    parser = configurator.parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    args = parser.parse_args()
    sys.exit(0 if audit(args.run) else 1)


if __name__ == "__main__":
    main()
