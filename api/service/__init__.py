"""From a wire request to a result: admission, pictures, the queue, and the workers it feeds."""
