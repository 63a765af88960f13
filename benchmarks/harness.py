"""Opens a checkpoint folder with lm-evaluation-harness, unchanged, and scores it on a small local task.

    pip install "lm-eval[hf]"
    python benchmarks/harness.py runs/demo                 # the first checkpoint and the last one

The script makes the task from validation rows of the run's own dataset: the first half of a row, and four
continuations, one of which is the row's own second half. Chance is 0.25. It writes the task in the harness's
format (a JSON-lines file and a YAML file) into a temporary folder. The harness loads each checkpoint with
`from_pretrained`, tokenizer included, and sees none of our code. Prints the accuracy that the harness reports
beside the same accuracy computed by our own model. If they differ, one of the two is wrong.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import configurator

YAML = """
task: nano360_continuation
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def questions(dataset, tokenizer, n: int) -> list[dict]:
    """n documents of the task: {"start", "choices": four texts, "label": the index of the true one}."""
    rows, half = dataset.validation(dataset.sources[0])[:n], dataset.seq_len // 2
    texts = [(tokenizer.decode(row[:half]), tokenizer.decode(row[half : half + 24])) for row in rows]
    out = []
    for i, (start, _) in enumerate(texts):
        # Three wrong choices are other rows' continuations.
        label = i % 4
        others = [texts[(i + 1 + 7 * k) % len(texts)][1] for k in range(4)]
        others[label] = texts[i][1]
        out.append({"start": start, "choices": others, "label": label})
    return out


def our_accuracy(folder: Path, asked: list[dict]) -> float:
    """The share of questions whose true choice has the largest sum of log-probabilities.

    It follows the harness's rule. Blanks at the end of the start belong to the choice. If the start has n
    tokens, the choice has those of the whole text after the first n, even if one crosses the border.
    """
    import torch

    import checkpoint
    import tokenizer as tokenizers

    model, tokenizer, right = checkpoint.load_model(folder), tokenizers.load(folder), 0
    for question in asked:
        start, scores = tokenizer.encode(question["start"].rstrip()), []
        for choice in question["choices"]:
            chosen = tokenizer.encode(question["start"] + choice)[len(start) :]
            targets = torch.tensor([[-100] * (len(start) - 1) + chosen])  # -100: not a target
            ids = torch.tensor([start + chosen])
            with torch.no_grad():
                scores.append(-model(ids[:, :-1], targets).item())
        right += scores.index(max(scores)) == question["label"]
    return right / len(asked)


def main() -> None:
    parser = configurator.parser(__doc__)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--questions", type=int, default=100)
    args = parser.parse_args()

    # Import the harness, and open the run and its dataset.
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        sys.exit("error: lm-evaluation-harness is not installed; pip install 'lm-eval[hf]'")
    import config
    import run_folder
    import tokenizer as tokenizers
    from dataset import Dataset

    try:
        found, dataset = run_folder.chosen(args.run), Dataset(config.load_run(args.run).dataset)
    except config.ConfigError as error:
        configurator.fail(error)

    # The task's two files; then each checkpoint, by the harness and by our model.
    asked = questions(dataset, tokenizers.load(dataset.folder), args.questions)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "test.jsonl"
        file.write_text("".join(json.dumps(question) + "\n" for question in asked))
        (Path(folder) / "task.yaml").write_text(YAML.format(file=file))
        tasks = TaskManager(include_path=folder)
        print(f"lm_eval {lm_eval.__version__}, {len(asked)} questions, chance 0.25")
        print(f"{'checkpoint':<16}{'harness':>9}{'ours':>7}")
        for c in (found[0], found[-1]):
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(c.path), "dtype": "float32"},
                tasks=["nano360_continuation"],
                task_manager=tasks,
                device="cpu",
                batch_size=1,
                bootstrap_iters=0,
            )
            theirs = results["results"]["nano360_continuation"]["acc,none"]
            print(f"{c.path.name:<16}{theirs:>9.3f}{our_accuracy(c.path, asked):>7.3f}", flush=True)


if __name__ == "__main__":
    main()
