"""Everyday prompts that have nothing to do with any context.

In: nothing. Out: `TRAINED`, on which an adapter may be held to the base model (`train.retain_weight`), and `HELD_OUT`, on
which it is measured how much it changed. Invariant: none is in both.
"""

from __future__ import annotations

TRAINED = (
    "What is the capital of Portugal?", "Explain what a fraction is.", "Write a short poem about autumn.",
    "How do plants get water from the ground?", "Give me three names for a small cafe.", "What is 14 times 6?",
    "Translate 'good evening' into Spanish.", "Why does ice float on water?", "Summarise the story of Cinderella.",
    "Write a function in Python that adds two numbers.", "What does the word 'brave' mean?", "How long does it take to boil an egg?",
    "Name two rivers in Africa.", "What is the difference between a crocodile and an alligator?",
    "Write an e-mail that asks for a meeting next week.", "Who painted the Mona Lisa?", "How can I fall asleep faster?",
    "List four kinds of cheese.", "What is photosynthesis?", "Tell me a joke about a penguin.",
    "How many legs does a spider have?", "Explain the rules of noughts and crosses.", "What is the opposite of 'ancient'?",
    "Describe a sunrise in one sentence.", "What is a prime number?", "How do I remove a coffee stain from a shirt?",
    "Which planet is the largest?", "Give me a recipe with tomatoes and rice.", "What causes thunder?",
    "Write a headline about a rescued whale.", "How do you say 'thank you' in Italian?", "What is a passport for?",
    "Name a book for a ten-year-old.", "How is glass made?", "What is the plural of 'mouse'?", "Convert 3 kilometres to metres.",
    "Why do leaves change their colour?", "Give me an idea for a school project about energy.", "What is an adjective?",
    "How does a bicycle pump work?",
)  # fmt: skip

HELD_OUT = (
    "What is the capital of Norway?", "Explain what an island is.", "Write two lines about a quiet street.",
    "How do fish breathe?", "Suggest a name for a grey dog.", "What is 9 plus 27?", "Translate 'see you tomorrow' into French.",
    "Why is the sky blue?", "What happens in the story of the tortoise and the hare?",
    "Write a Python loop that prints the numbers 1 to 5.", "What does 'to hesitate' mean?", "How do I cook rice?",
    "Name three countries in South America.",
    "What is the difference between a violin and a cello?", "Write a thank-you note to a teacher.", "Who wrote Hamlet?",
    "How can I learn words of a language faster?", "List three things to take to the beach.", "What is gravity?",
    "Tell me a riddle.", "How many minutes are in two hours?", "What is the opposite of 'generous'?",
    "Describe a forest in winter.", "What is a square root?",
)  # fmt: skip
