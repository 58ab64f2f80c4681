"""Render the templates with transformers, and write down what it makes of them: `python make_expected.py`.

It needs transformers and jinja2, and no torch.  The templates are our own; each uses the constructs of a published
family: ChatML, Llama 2, Llama 3, Mistral, Gemma, Zephyr, Qwen 3, SmolLM, Command R and Qwen-VL.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <&>'\""}}}
TALK = [
    {"role": "system", "content": " Be short. \n"},
    {"role": "user", "content": ' Hello <b>world</b> & "you"! \n'},
    {"role": "assistant", "content": "\nHi 🙂. "},
    {"role": "user", "content": "What's 1 + 2?\n\nAnd {{ 3 }}?"},
]
CONVERSATIONS = {
    "one": [{"role": "user", "content": "Hi"}],
    "talk": TALK,
    "without system": TALK[1:],
    "answered": [*TALK, {"role": "assistant", "content": "<think>\n1, 2, 3\n</think>\n\n3"}],
    "wrong order": [TALK[1], TALK[1]],
    "tool": [
        TALK[1],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "12 °C", "tool_call_id": "call00001", "name": "weather"},
    ],
    "two tools": [
        TALK[1],
        {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "12 °C", "tool_call_id": "call00001"},
        {"role": "tool", "content": "13 °C", "tool_call_id": "call00002"},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}, {"type": "image"}]}
    ],
    "nothing said": [{"role": "user", "content": None}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather of a city, e.g. "Zürich" <now>',
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["é", "b'c"]}}},
        },
    }
]
DOCUMENTS = [{"title": "One", "text": "a < b"}, {"title": "Two", "text": "ü"}]
SPECIAL = {
    "all": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "null": {"bos_token": None, "eos_token": "</s>", "unk_token": None, "add_bos_token": True},
    "object": {"bos_token": {"content": "<s>", "lstrip": False, "special": True}, "eos_token": "</s>"},
}


def cases():
    """Every template with every conversation, with and without what else it may be given."""
    for template in sorted(path.stem for path in HERE.glob("*.jinja")):
        for conversation in CONVERSATIONS:
            for special in SPECIAL:
                for more in ("", "prompt", "prompt tools documents") if special == "all" else ("prompt",):
                    yield template, conversation, special, more


def arguments(conversation: str, more: str) -> dict:
    """What is rendered, in the words of transformers and of ours."""
    return {
        "messages": CONVERSATIONS[conversation],
        "add_generation_prompt": "prompt" in more,
        "tools": TOOLS if "tools" in more else None,
        "documents": DOCUMENTS if "documents" in more else None,
    }


def by_transformers(template: str, conversation: str, special: str, more: str) -> str | None:
    """The text; None if it refuses."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    told = arguments(conversation, more)
    empty = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokens = {
        k: v["content"] if isinstance(v, dict) else v for k, v in SPECIAL[special].items() if k != "add_bos_token"
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=empty, **tokens)
    source = (HERE / f"{template}.jinja").read_text(encoding="utf-8")
    try:
        return tokenizer.apply_chat_template(told.pop("messages"), chat_template=source, tokenize=False, **told)
    except Exception:
        return None


if __name__ == "__main__":
    texts = {" | ".join(case): by_transformers(*case) for case in cases()}
    text = json.dumps(texts, indent=0, ensure_ascii=False)
    (HERE / "expected.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(texts)} cases, {sum(t is None for t in texts.values())} refused")
