"""`lmtrain export RUN --to FOLDER`: a trained model as a folder that other programs open.

  lmtrain export RUN --to FOLDER [--checkpoint C] [--dtype fp32|bf16|fp16]   for Hugging Face's transformers
  lmtrain export RUN --to FOLDER --format mlflow [--checkpoint C]            for `mlflow models serve`

RUN is a run folder, or a model of the store (NAME, NAME:VERSION). FOLDER, which is made, gets the model in the Llama or
the GPT-2 format and its tokenizer: the same logits, and the same text. It is also read by init_from=FOLDER. What the
formats cannot hold is refused by name. As an MLflow model, any model is served over HTTP and writes what `lmtrain
generate` does.
"""

from __future__ import annotations

from pathlib import Path

from lmtrain.commands import CommandParser
from lmtrain.config.schema.rules import require
from lmtrain.inference.export import DTYPES, export_run
from lmtrain.inference.serving import save_mlflow_model
from lmtrain.store import find_run
from lmtrain.store.entry import require_as_saved


def main(arguments: list[str]) -> int:
    """Write the folder and say how to open it; exit status 0. Raises LmtrainError for what cannot be done."""
    parser = CommandParser("export", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or NAME[:VERSION] of the model store")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder, or an empty one")
    chosen = "last, best or a step (default: the best, else the newest)"
    parser.add_argument("--checkpoint", metavar="C", help=chosen)
    kinds = ("huggingface", "mlflow")
    parser.add_argument("--format", choices=kinds, default=kinds[0], help=f"what for (default {kinds[0]})")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the weights for transformers (default fp32)")
    options = parser.parse_args(arguments)
    run, to, dtype = find_run(options.run).folder, options.to, options.dtype or "fp32"
    require_as_saved(run)
    if options.format == "mlflow":
        require(options.dtype is None, "--dtype is not for --format mlflow: what is served is the model as trained")
        exported = save_mlflow_model(run, to, checkpoint=options.checkpoint)
        use = f"serve it with mlflow models serve -m {to} --env-manager local"
    else:
        exported = export_run(run, to, checkpoint=options.checkpoint, dtype=dtype)
        use = (
            f'open it with transformers: AutoModelForCausalLM.from_pretrained("{to}"), AutoTokenizer likewise; '
            f"train on with init_from={to} tokenizer=saved tokenizer.path={to}"
        )
    size = f"{exported.num_parameters:,} parameters in {dtype}"
    print(f"{to}: step {exported.step:,} in the {exported.format} format, {size}\n{use}")
    return 0
