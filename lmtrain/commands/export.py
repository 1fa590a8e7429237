"""`lmtrain export RUN --to FOLDER`: a trained model as a folder that Hugging Face's transformers opens.

  lmtrain export RUN --to FOLDER [--checkpoint C] [--dtype fp32|bf16|fp16]

RUN is a run folder. FOLDER, which is made, gets the model in the Llama or the GPT-2 format and its tokenizer: the same
logits, and the same text. It is also read by init_from=FOLDER. What the formats cannot hold is refused by name.
"""

from __future__ import annotations

from pathlib import Path

from lmtrain.commands import CommandParser
from lmtrain.inference.export import DTYPES, export_run


def main(arguments: list[str]) -> int:
    """Write the folder and say how to open it; exit status 0. Raises LmtrainError for what cannot be done."""
    parser = CommandParser("export", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder, or an empty one")
    chosen = "last, best or a step (default: the best, else the newest)"
    parser.add_argument("--checkpoint", metavar="C", help=chosen)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="number format of the weights (default fp32)")
    options = parser.parse_args(arguments)
    exported = export_run(options.run, options.to, checkpoint=options.checkpoint, dtype=options.dtype)
    print(
        f"{options.to}: step {exported.step:,} in the {exported.format} format, {exported.num_parameters:,} parameters "
        f"in {options.dtype}\n"
        f'open it with transformers: AutoModelForCausalLM.from_pretrained("{options.to}"), AutoTokenizer likewise; '
        f"train on with init_from={options.to} tokenizer=saved tokenizer.path={options.to}"
    )
    return 0
