"""`transformers serve` for AlignVLM checkpoints: an OpenAI-compatible server on this machine.

    python demo/serve.py user/my-alignvlm --port 8000      # or a checkpoint folder; all options of `transformers serve`

The command itself (transformers 5.23, 5.24) serves only classes it has by name, with `--trust-remote-code` too: it looks the architecture
up in `transformers` and its kind in a table. This tells it of both, and of what to answer to a request that cannot be served; then
it is that command. The code is this package's, not the repository's.
"""

import sys
from pathlib import Path

from transformers.cli.serving import model_manager, server
from transformers.cli.serving.utils import BaseHandler
from transformers.cli.transformers import main as transformers_command
from transformers.models.auto import modeling_auto
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python demo/serve.py`

from modeling_alignvlm import AlignVLMForConditionalGeneration


logger = logging.get_logger("transformers.alignvlm")
build_server = server.build_server
convert_messages = BaseHandler.get_processor_inputs_from_messages


def build_server_that_explains(*args, **kwargs):
    """The application of `transformers serve`, where a `ValueError` (a damaged image, a typed placeholder, a part of a message that has
    no place) is answered with status 400 and its sentence instead of a bare 500."""
    from fastapi.responses import JSONResponse  # the command has said by now what to install if it is missing

    app = build_server(*args, **kwargs)

    @app.exception_handler(ValueError)
    async def explain(request, error: ValueError) -> JSONResponse:
        logger.warning(f"Refused {request.method} {request.url.path}: {error}", exc_info=error)
        return JSONResponse({"error": str(error)}, status_code=400)

    return app


def convert_every_part(messages: list[dict], modality) -> list[dict]:
    """OpenAI's messages as the processor takes them; what transformers has no conversion for is refused, not dropped.

    Raises:
        ValueError: naming the types of a message of which a part was dropped.
    """
    converted = convert_messages(messages, modality)
    for index, (message, result) in enumerate(zip(messages, converted)):
        given, kept = message.get("content"), result["content"]
        if (
            isinstance(given, list)
            and isinstance(kept, list)
            and len(kept) < len(given)
            and "tool_calls" not in message
        ):
            types = ", ".join(repr(part.get("type")) for part in given)
            raise ValueError(
                f"Message {index} has parts of the types {types}, not all of which this model takes. Give 'text' and 'image_url' "
                "(of /v1/responses: 'input_text' and 'input_image')."
            )
    return converted


def main() -> None:
    name = AlignVLMForConditionalGeneration.__name__
    setattr(model_manager.transformers, name, AlignVLMForConditionalGeneration)
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["alignvlm"] = name
    server.build_server = build_server_that_explains
    BaseHandler.get_processor_inputs_from_messages = staticmethod(convert_every_part)
    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    transformers_command()


if __name__ == "__main__":
    main()
