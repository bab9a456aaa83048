"""What all APIs that generate share: the chat, its prompt, its run on the engine, and the face of its answer."""
