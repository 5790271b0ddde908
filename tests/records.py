"""Records of single exchanges, written and read as tests want them."""

from alignvlm.data.record import Record, one_turn


def of_exchanges(images: list, exchanges: list[tuple[str, str]], **columns) -> dict:
    """A row of `images` with a conversation for each prompt and response, all images before the prompt."""
    conversations = [one_turn(prompt, [response], len(images)) for prompt, response in exchanges]
    return {**Record(images, conversations).to_row(), **columns}


def exchanges_of(row: dict) -> list[tuple[str, str]]:
    """The last prompt and each response of a row's conversations."""
    return [(c.prompt, response) for c in Record.from_row(row).conversations for response in c.responses]


def responses_of(row: dict) -> list[str]:
    return [response for _, response in exchanges_of(row)]
