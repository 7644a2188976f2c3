"""Chat templates of language models, before which a vision encoder is put: their messages get parts, and images a mark."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

# The words of a message of parts as one string: an image is its token on a line of its own, as `cdistill.data` trains.
_JOINED = """\
{%%- set joined = namespace(messages=[]) -%%}
{%%- for message in messages -%%}
    {%%- if message.content is string -%%}
        {%%- set joined.messages = joined.messages + [message] -%%}
    {%%- else -%%}
        {%%- set said = namespace(text="") -%%}
        {%%- for part in message.content -%%}
            {%%- set said.text = said.text ~ (%s if part.type == "image" else part.text) -%%}
        {%%- endfor -%%}
        {%%- set joined.messages = joined.messages + [{"role": message.role, "content": said.text}] -%%}
    {%%- endif -%%}
{%%- endfor -%%}
{%%- set messages = joined.messages -%%}
"""


def taking_parts(tokenizer: Any, image_token: Any) -> Any:
    """The tokenizer's chat template, for messages whose content may also be parts (text and images).

    A template that writes only strings gets lines before it that join the parts; one that takes parts already, that refuses
    both, or of which a tokenizer has several by name, stays as it is.
    """
    source = tokenizer.chat_template
    if not isinstance(source, str) or _takes_parts(source, tokenizer, image_token):
        return source
    joined = _JOINED % json.dumps(f"{image_token}\n") + source
    return joined if _takes_parts(joined, tokenizer, image_token) else source


def _takes_parts(source: str, tokenizer: Any, image_token: str) -> bool:
    content = [{"type": "image"}, {"type": "text", "text": "see this"}]
    chat: list[Any] = [{"role": "user", "content": content}, {"role": "assistant", "content": "all right"}]
    try:
        rendered: Any = render_jinja_template(
            conversations=[chat], chat_template=source, **tokenizer.special_tokens_map
        )
    except (TemplateError, TypeError):
        return False
    text = rendered[0][0]
    return text.count(image_token) == 1 and "see this" in text and "all right" in text and "'type'" not in text
