"""Chat templates of the published kinds, over a tokenizer with a token per byte."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mulligan.common.inference import Tool
from mulligan.policy.chat import Chat
from mulligan.policy.huggingface.tokenizer import Tokenizer as Wrapped

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<|user|>",
    "<|observation|>",
]
MARKS = ["<think>", "</think>", "<tool_call>", "<｜User｜>"]  # added, and not flagged as special
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n' }}"
    "{{ system + '<|eot_id|>' }}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (  # drops the thoughts of all turns but those after the last question
    "{% set last = namespace(index=0) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set last.index = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'assistant' %}"
    "{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > last.index and (loop.last or thought) %}"
    "{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (  # leaves system messages out without a word; closes turns with a space before the token
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] +"
    " ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)
# What follows knows tools. Qwen 2.5: declared in the system turn, answered within a user's turn, many answers in one.
QWEN2 = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}"
    "{% endfor %}{{ '\n</tools><|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif message.role == 'assistant' and message.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% if message.content %}{{ '\n' + message.content }}{% endif %}{% for call in message.tool_calls %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}"
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3.1: declared in the first user's turn, one call at a time, answered by a role of its own, quoted as JSON.
LLAMA31 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{% if message.role == 'user' and loop.first and tools %}{{ '<|start_header_id|>user<|end_header_id|>\n\n' }}"
    "{% for tool in tools %}{{ (tool | tojson(indent=4)) + '\n\n' }}{% endfor %}"
    "{{ (message.content | trim) + '<|eot_id|>' }}"
    "{% elif 'tool_calls' in message %}{% if message.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ (call.arguments | tojson) + '}<|eot_id|>' }}"
    "{% elif message.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{{ (message.content | tojson) + '<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{ (message.content | trim) + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Hermes: a template of its own for tools, in which an answer must follow a call.
HERMES = {
    "default": CHATML,
    "tool_use": (
        "{{ '<|im_start|>system\nYou may call' }}{% for tool in tools %}{{ ' ' + (tool.function | tojson) }}"
        "{% endfor %}"
        "{{ '<|im_end|>\n' }}{% for message in messages %}{% if message.role == 'tool' %}"
        "{% set before = messages[loop.index0 - 1] %}{% if before.role != 'tool' %}{% if not before.tool_calls %}"
        "{{ raise_exception('a tool answers a call') }}{% endif %}{{ '<|im_start|>tool\n' }}{% endif %}"
        "{{ '<tool_response>\n' + message.content + '\n</tool_response>' }}"
        "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% else %}{{ '\n' }}{% endif %}"
        "{% elif message.tool_calls %}{{ '<|im_start|>assistant' }}{% for call in message.tool_calls %}"
        "{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
WITH_TOOLS = {"qwen2": QWEN2, "llama3.1": LLAMA31, "hermes": HERMES}
END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "qwen3": "<|im_end|>"}
END_OF_TURN |= {"qwen2": "<|im_end|>", "llama3.1": "<|eot_id|>", "hermes": "<|im_end|>"}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "qwen3": QWEN3}
KEEPING = ("chatml", "llama3", "gemma")


def byte_tokenizer() -> Tokenizer:
    """A token per byte, and the special ones: no merge can reach over the end of a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(MARKS)
    return tokenizer


TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def wrapped(source: str | dict[str, str]) -> Wrapped:
    inner = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER)
    inner.chat_template = source
    return Wrapped(inner)


def chat(source: str | dict[str, str], end_of_turn: str) -> Chat:
    return wrapped(source).chat(encode(end_of_turn))


ALL_TEMPLATES: dict[str, Any] = {**TEMPLATES, **WITH_TOOLS}
CHATS = {name: chat(source, END_OF_TURN[name]) for name, source in ALL_TEMPLATES.items()}
TOOLS = (Tool("weather", 'Of a "city"', '{"type": "object", "properties": {"city": {"type": "string"}}}'),)
# Mistral: ids of nine letters and digits, either content or calls, tools before the last question.
MISTRAL_TOOLS = (
    "{% set last = namespace(index=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set last.index = loop.index0 %}{% endif %}{% endfor %}"
    "{{ '<s>' }}{% for message in messages %}{% if message.role == 'user' %}"
    "{% if tools and loop.index0 == last.index %}"
    "{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + message.content + '[/INST]' }}{% elif message.tool_calls is defined %}"
    "{% if message.content %}{{ raise_exception('either content or calls') }}{% endif %}{{ '[TOOL_CALLS][' }}"
    "{% for call in message.tool_calls %}{% if call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}"
    "{% endif %}{{ (call.function | tojson) + ', \"id\": \"' + call.id + '\"' }}{% endfor %}{{ ']</s>' }}"
    "{% elif message.role == 'tool' %}{% if message.tool_call_id | length != 9 %}{{ raise_exception('no id') }}"
    "{% endif %}{{ '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}"
    "{% elif message.role == 'assistant' %}{{ message.content + '</s>' }}{% endif %}{% endfor %}"
)
# Arguments as JSON text, and no call without content.
TEXT_ARGUMENTS = QWEN2.replace("call.function.arguments | tojson", "'' + call.function.arguments").replace(
    "{% if message.content %}{{ '\n' + message.content }}{% endif %}",
    "{% if not message.content %}{{ raise_exception('no content') }}{% endif %}",
)
# GLM 4: a turn ends where the next begins.
GLM4 = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
