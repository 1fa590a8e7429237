"""What MLflow runs of a saved model ("models from code"): a copy of this file lies in every such folder.

So it says as little as can be, and what it takes from `serving.py` must stay there. Nothing of ours imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from lmtrain.errors import LmtrainError, UsageError
from lmtrain.inference import load_model
from lmtrain.inference.serving import DEVICE, RUN, TEXT, answer


class ServedModel(PythonModel):
    """A trained model whose prompts are rows of a table."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the model. Raises LmtrainError."""
        self._trained = load_model(Path(context.artifacts[RUN]), device=context.model_config[DEVICE])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """A row for each text. Raises MlflowException: HTTP status 400 for what is wrong with a request, else 500."""
        try:
            texts = answer(self._trained, model_input.to_dict("records"), params or {})
        except LmtrainError as error:
            code = INVALID_PARAMETER_VALUE if isinstance(error, UsageError) else INTERNAL_ERROR
            raise MlflowException(str(error), code) from error
        return pd.DataFrame({TEXT: texts})


mlflow.models.set_model(ServedModel())
