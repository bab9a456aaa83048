"""`/v1/responses`: answers to chats as OpenAI's newer API has them, stored for later turns."""
