"""A chat template of transformers as llama.cpp's server can use it."""

from __future__ import annotations

import json
from collections.abc import Sequence

# The server makes one text of a message's parts, in which `<__media...__>` stands for an image.
_IMAGES = """\
{%- set chat = namespace(marker="", messages=[]) -%}
{%- for message in messages -%}
    {%- set turn = namespace(text="", parts=[]) -%}
    {%- if message.content is string -%}
        {%- set turn.text = message.content -%}
    {%- elif message.content is not none -%}
        {%- for part in message.content -%}{%- set turn.text = turn.text + part.text -%}{%- endfor -%}
    {%- endif -%}
    {%- if "<__media" in turn.text -%}
        {%- for piece in turn.text.split("<__media") -%}
            {%- set rest = namespace(text=piece) -%}
            {%- if not loop.first -%}
                {%- set chat.marker = "<__media" + piece.split("__>")[0] + "__>" -%}
                {%- set rest.text = piece.split("__>")[1:] | join("__>") -%}
                {%- set turn.parts = turn.parts + [{"type": "image"}] -%}
            {%- endif -%}
            {%- if rest.text -%}
                {%- set turn.parts = turn.parts + [{"type": "text", "text": rest.text}] -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set chat.messages = chat.messages + [{"role": message.role, "content": turn.parts}] -%}
    {%- else -%}
        {%- set chat.messages = chat.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = chat.messages -%}
"""
_MARKED = """{{- prompt if chat.marker == "" else prompt | replace(IMAGE, chat.marker) -}}\n"""


def llama_cpp_template(template: str, image_token: str | None, unspaced: Sequence[str] | None = None) -> str:
    """A chat template of transformers for llama.cpp's server, which renders prompts as transformers does.

    The template gets images as the parts that it knows, and each ``image_token`` it writes becomes the server's marker. A
    message may have one text between images: of several the server makes one, a line each. With ``unspaced`` a space is put
    before a prompt that does not begin with one of these or a space. Of a model without images (``image_token`` None) and
    without such a space it is as it was.
    """
    if image_token is None and unspaced is None:
        return template
    begun = "{%- set prompt %}\n" + template.removesuffix("\n") + '{{ "" }}{% endset -%}\n'
    if unspaced is not None:
        known = " or ".join(f"prompt.startswith({json.dumps(text)})" for text in (" ", *unspaced))
        begun += '{{- "" if ' + known + ' else " " -}}\n'
    if image_token is None:
        return begun + "{{- prompt -}}\n"
    return _IMAGES + begun + _MARKED.replace("IMAGE", json.dumps(image_token))
