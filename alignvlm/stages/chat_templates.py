"""Chat templates: the language model's own, extended by image parts, or one of two for language models without one.

A language model's own template reads messages whose content is a text. `extended_template` puts a few lines in front of it that join
the parts of a message into such a text, an image as its placeholder; the template behind them stays as it is, with its system
message, its end-of-turn tokens and its roles. What a template does is found by rendering short conversations (`check_template`,
`end_of_turn_ids`), not by its name.
"""

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from alignvlm.data.record import ROLES


logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<image>"
IMAGE_BEGIN, IMAGE_END = "<start_of_image>", "<end_of_image>"  # what Gemma 3 and llama.cpp write around an image
# transformers hands a template each of these where a message has one of them
REASONING_FIELDS = frozenset(("reasoning_content", "thinking", "reasoning"))

# Both write the parts of a message in order, an image as its placeholder; `generation` marks what the assistant says. What they have
# no place for is refused: the processor does it with more words, this is for a tokenizer used alone.
_PARTS = """\
{%- macro parts(message, gap) -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{ raise_exception('The roles are system, user and assistant, not ' ~ message.role) }}
{%- endif -%}
{%- for field in message if field not in ['role', 'content'] and message[field] -%}
{{ raise_exception('A message has a role and a content, not ' ~ field) }}
{%- endfor -%}
{%- if message.content is string -%}{{ gap + message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<image>
{%- elif part.type == 'text' -%}{{ gap + part.text }}
{%- else -%}{{ raise_exception('The parts of a message are of type text or image, not ' ~ part.type) }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
CHATML_TEMPLATE = (
    _PARTS
    + """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ parts(message, '') + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}
{%- else -%}{{ parts(message, '') + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
)
# For language models without chat tokens: plain words that any tokenizer can write, each text behind a space, so that its
# first word has the same tokens behind an image and behind words.
PLAIN_TEMPLATE = (
    _PARTS
    + """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ 'Assistant:' }}{%- generation -%}{{ parts(message, ' ') + eos_token }}{%- endgeneration -%}{{ '\\n' }}
{%- else -%}{{ message.role | capitalize + ':' + parts(message, ' ') + '\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""
)
# Stands before a language model's own template. The processor reads from the template's text which fields and roles it knows, so no
# other are named here. It ends with a line break that Jinja drops, not with a dash, which would eat what the template begins with.
_FLATTENING = """\
{%- set flattened = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.role not in ROLES -%}
{{ raise_exception('The chat template of this language model has no place for the role ' ~ message.role ~ '; it takes ' ~ ROLES | join(', ') ~ '.') }}
{%- endif -%}
{%- for further in message if further not in FIELDS and message[further] -%}
{{ raise_exception('The chat template of this language model does not read ' ~ further ~ ' of a message. Write it into the content.') }}
{%- endfor -%}
{%- if message.content is undefined or message.content is none or message.content is string -%}
{%- set flattened.messages = flattened.messages + [message] -%}
{%- else -%}
{%- set joined = namespace(text='') -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{%- set joined.text = joined.text + IMAGE_TEXT -%}
{%- elif part.type == 'text' and part.text is string -%}
{%- set joined.text = joined.text + part.text -%}
{%- else -%}
{{ raise_exception('The parts of a message are of type text, with a text, or image, not ' ~ part.type) }}
{%- endif -%}
{%- endfor -%}
{%- set flattened.messages = flattened.messages + [dict(message, content=joined.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flattened.messages %}
"""

_SYSTEM = {"role": "system", "content": "Answer in a short sentence."}
_QUESTION, _ANSWER = (
    {"role": "user", "content": "Why is it wet?"},
    {"role": "assistant", "content": "Rain fell on it."},
)


def chat_template(tokenizer: PreTrainedTokenizerBase, image_text: str = IMAGE_TOKEN) -> tuple[str, bool]:
    """The chat template for a checkpoint, and whether it is the language model's own (extended by image parts).

    Language models without one get ChatML where their vocabulary has its tokens, else plain words.

    Args:
        image_text: what is written for an image: the image token, or that with a token before and one behind it.

    Raises:
        ValueError: as `extended_template`.
    """
    ours = [template.replace(IMAGE_TOKEN, image_text) for template in (CHATML_TEMPLATE, PLAIN_TEMPLATE)]
    if tokenizer.chat_template:
        template = extended_template(tokenizer, image_text)
        return template, template not in ours
    return ours[0] if "<|im_end|>" in tokenizer.get_vocab() else ours[1], False


def extended_template(tokenizer: PreTrainedTokenizerBase, image_text: str = IMAGE_TOKEN) -> str:
    """The tokenizer's own chat template, extended by image parts; of several named ones the default.

    A template that writes `image_text` itself is returned as it is. For messages of texts the extended template writes exactly
    what the original does. Roles and further fields of a message that the original does not read, and parts other than texts and
    images, are refused when it is rendered.

    Raises:
        ValueError: if there is no default template, if it writes the image token without what `image_text` has around it, or if it
            cannot be used (`check_template`).
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ValueError(
                f"The tokenizer has the chat templates {', '.join(sorted(template))} and none called default. Save it with one "
                "template, as `tokenizer.chat_template`, and name that folder."
            )
        template = template["default"]
    if template in (CHATML_TEMPLATE, PLAIN_TEMPLATE):
        template = template.replace(IMAGE_TOKEN, image_text)
    elif IMAGE_TOKEN not in template:
        known, fields = _read_names(template)
        roles = [role for role in ROLES if not _drops(tokenizer, template, role)] + sorted(known - set(ROLES))
        head = _FLATTENING.replace("IMAGE_TEXT", repr(image_text))
        head = head.replace("ROLES", repr(roles)).replace("FIELDS", repr(["role", "content", *sorted(fields)]))
        template = head + template
    elif image_text not in template:
        raise ValueError(
            f"The chat template of the language model writes {IMAGE_TOKEN} itself, and not {image_text}. Write that there, or leave the "
            "tokens around an image out: --image_begin '' --image_end ''."
        )
    check_template(tokenizer, template)
    return template


def check_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Tries a question and its answer.

    Raises:
        ValueError: if the template cannot be rendered, or if an answer is not written behind the prompt for it, so that prompt and
            answer cannot be told apart.
    """
    try:
        prompt = _write(tokenizer, [_QUESTION], template, add_generation_prompt=True)
        both = _write(tokenizer, [_QUESTION, _ANSWER], template)
    except Exception as error:  # whatever a template of others raises
        raise ValueError(
            f"The chat template of the language model cannot write a question and an answer: {type(error).__name__}: {error}"
        ) from error
    if (
        _QUESTION["content"] not in prompt
        or _ANSWER["content"] not in both[len(prompt) :]
        or not both.startswith(prompt)
    ):
        raise ValueError(
            f"The chat template of the language model writes {prompt!r} before an answer is generated, but {both!r} with the answer, "
            "which does not begin so: an answer could not be trained as it is generated. Save the tokenizer with a template in "
            "which it does, as `tokenizer.chat_template`, and name that folder."
        )


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> set[int]:
    """The token with which the template ends an answer, such as `<|im_end|>`; empty, with a warning, if it writes none."""
    written = _write(tokenizer, [_QUESTION, _ANSWER], template)
    end = written[written.rindex(_ANSWER["content"]) + len(_ANSWER["content"]) :]
    for token in tokenizer(end, add_special_tokens=False)["input_ids"]:
        if token in tokenizer.added_tokens_decoder or token in tokenizer.all_special_ids:
            return {token}
    logger.warning(
        f"The chat template of the language model writes {end!r} behind an answer, which holds no special token: the model may not "
        "learn where an answer ends."
    )
    return set()


def _write(processor, messages: list[dict], template: str | None = None, **options) -> str:
    return processor.apply_chat_template(messages, chat_template=template, tokenize=False, **options)


def _drops(tokenizer: PreTrainedTokenizerBase, template: str, role: str) -> bool:
    """Whether messages of this role vanish silently. Those that the template refuses itself do not."""
    messages = {"system": [_SYSTEM, _QUESTION], "user": [_QUESTION], "assistant": [_QUESTION, _ANSWER]}[role]
    try:
        written = _write(tokenizer, messages, template)
    except Exception:  # the template's own refusal
        return False
    return any(message["content"] not in written for message in messages if message["role"] == role)


def _read_names(template: str) -> tuple[set[str], set[str]]:
    """The roles that a template compares a role with, and the fields that it reads of whatever it reads a role or a content of."""
    try:
        tree = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError as error:
        raise ValueError(f"The chat template of the language model is not valid Jinja: {error}") from error
    reads: dict[str, set[str]] = {}
    for owner, key in filter(None, map(_field_read, tree.find_all(nodes.Node))):
        reads.setdefault(owner, set()).add(key)
    fields = {name for names in reads.values() if names & {"role", "content"} for name in names}
    fields |= REASONING_FIELDS if fields & REASONING_FIELDS else set()
    roles = set()
    for comparison in tree.find_all(nodes.Compare):
        sides = [comparison.expr, *(operand.expr for operand in comparison.ops)]
        if any(
            side.name == "role" if isinstance(side, nodes.Name) else (_field_read(side) or ("", ""))[1] == "role"
            for side in sides
        ):
            constants = [constant for side in sides for constant in (side, *side.find_all(nodes.Const))]
            roles |= {
                node.value for node in constants if isinstance(node, nodes.Const) and isinstance(node.value, str)
            }
    return roles - {"role"}, fields - {"role", "content", "get"}


def _field_read(node: nodes.Node) -> tuple[str, str] | None:
    """The variable and the field of `message.x`, `message['x']`, `messages[0].x`, `message.get('x')` and `'x' in message`."""
    if isinstance(node, nodes.Getattr):
        owner, key = node.node, node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        owner, key = node.node, node.arg.value
    elif (
        isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get" and node.args
    ):
        owner, key = node.node.node, getattr(node.args[0], "value", None)
    elif isinstance(node, nodes.Compare) and isinstance(node.expr, nodes.Const) and node.ops[0].op in ("in", "notin"):
        owner, key = node.ops[0].expr, node.expr.value
    else:
        return None
    while isinstance(owner, nodes.Getitem):
        owner = owner.node
    return (owner.name, key) if isinstance(owner, nodes.Name) and isinstance(key, str) else None


class _Generation(Extension):
    """Reads transformers' `generation` blocks."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)
