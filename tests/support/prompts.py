"""32 prompts in plain English for the bundled model, from a few words to a few hundred tokens."""

from __future__ import annotations

from functools import cache

from gateway.cli.model import find_model
from gateway.text import load_text

STORY = (
    "The lighthouse keeper's daughter counted ships the way other children count sheep. By the"
    " time she was nine she could tell a herring boat from a coal barge by the colour of its smoke,"
    " and by twelve she kept the log in her own hand, because her father's had begun to shake. She"
    " wrote down the hour, the wind, the height of the glass, and one thing that nobody had asked"
    " for: what the sea had sounded like. Some nights it was a door being closed carefully. Some"
    " nights it was applause. When the company sent a man to inspect the books he turned the pages"
    " for a long time without a word, and then he asked her whether she would like to come to the"
    " city and write for a living. "
)
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short poem about autumn leaves.",
    "Explain how a bicycle stays upright.",
    "List three uses of a paper clip.",
    "What is 17 plus 25?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Describe the taste of a lemon.",
    "How do I boil an egg?",
    "What are the primary colours?",
    "Name a planet with rings.",
    "Why do cats purr?",
    "Write a one-line joke about computers.",
    "What does photosynthesis mean?",
    "How many days are there in a leap year?",
    "Give me a name for a friendly dragon.",
    "What is the largest ocean?",
    "Explain gravity to a child.",
    "What should I pack for a day at the beach?",
    "Write a haiku about rain.",
    "What is the opposite of 'brave'?",
    "How does a rainbow form?",
    "Suggest a title for a book about a lost key.",
    "What is the boiling point of water?",
    "Tell me about the moon in one sentence.",
    "Why do leaves change colour?",
    "What is a synonym for 'happy'?",
    "Write an apology for being late.",
    "How do bees make honey?",
    "What is the square root of 81?",
    "Finish the sentence: once upon a time",
)


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """Each question as a chat; every fourth one after some of the story."""
    vocabulary = load_text(find_model("bundled"))
    chats = []
    for number, question in enumerate(QUESTIONS):
        before = STORY * (number // 8 + 1) if number % 4 == 3 else ""
        text = vocabulary.chat_prompt([{"role": "user", "content": before + question}])
        chats.append(tuple(vocabulary.encode(text, add_special_tokens=True)))
    return tuple(chats)
