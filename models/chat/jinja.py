"""Dialogues as the Jinja templates that transformers renders conversations with.

A message's content is a text, or a list of {"type": "text", "text": ...} and {"type": "image"}. A
picture becomes one <IMG_CONTEXT>, which the processor makes as many of as it has visual tokens.
"""

from __future__ import annotations

import json

from vlfoundry.models.chat.templates import IMG_CONTEXT, Template

_PARTS = """\
{%- for message in messages %}
{%- set said = namespace(images='', text='') %}
{%- if message.content is string %}
{%- set said.text = message.content %}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' or 'image' in part %}
IMAGE
{%- else %}
{%- set said.text = said.text + part.text %}
{%- endif %}
{%- endfor %}
{%- endif %}
"""
_PLAIN = """\
{{- bos_token }}
PARTS
{%- if message.role == 'assistant' %}
{{- ' ' + said.text | trim + eos_token }}
{%- elif message.role == 'system' %}
{{- said.text | trim }}
{%- else %}
{{- said.images + '\\nUser: ' + said.text | trim + '\\nAssistant:' }}
{%- endif %}
{%- endfor %}
"""
_NAMED = """\
BEGIN
{%- if not messages or messages[0].role != 'system' %}
{{- HEADER + SYSTEM + SYSTEM_END }}
{%- endif %}
PARTS
{%- if message.role == 'assistant' %}
{{- ASSISTANT + LEAD + said.text + ANSWER_END + AFTER_ANSWER }}
{%- elif message.role == 'system' %}
{{- HEADER + said.text + SYSTEM_END }}
{%- else %}
{{- USER + LEAD + said.text + USER_END }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- ASSISTANT }}
{%- endif %}
"""


def plain() -> str:
    """Our own models' dialogue: pictures that open a question stand before its "User:"."""
    image = f"""\
{{%- if said.text | trim %}}
{{%- set said.text = said.text + '{IMG_CONTEXT}' %}}
{{%- else %}}
{{%- set said.images = said.images + '{IMG_CONTEXT}' %}}
{{%- endif %}}"""
    return _PLAIN.replace("PARTS\n", _PARTS.replace("IMAGE", image))


def named(template: Template, *, begins: bool) -> str:
    """An official model's: each picture on a line of its own.

    Args:
        template: how a conversation is written.
        begins: whether a begin token opens it.
    """
    image = f"{{%- set said.text = said.text + '{IMG_CONTEXT}\\n' %}}"
    source = _NAMED.replace("BEGIN\n", "{{- bos_token }}\n" if begins else "")
    source = source.replace("PARTS\n", _PARTS.replace("IMAGE", image))
    for place, text in (
        ("AFTER_ANSWER", template.after_answer),
        ("ANSWER_END", template.answer_end),
        ("ASSISTANT", template.assistant),
        ("USER_END", template.user_end),
        ("USER", template.user),
        ("LEAD", template.lead),
        ("SYSTEM_END", template.system_end),
        ("SYSTEM", template.system),
        ("HEADER", template.system_header),
    ):
        source = source.replace(f" {place} ", f" {json.dumps(text, ensure_ascii=False)} ")
    return source
