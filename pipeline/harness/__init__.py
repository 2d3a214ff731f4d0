"""The model "dlm" of lm-evaluation-harness: importing this package makes it known, without loading torch."""

try:
    from lm_eval.api.registry import model_registry
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("pipeline.harness needs lm-evaluation-harness: pip install 'dlm[eval]'") from error

NAME = "dlm"

model_registry.register(NAME, target="pipeline.harness.model:DenoiserLM")
