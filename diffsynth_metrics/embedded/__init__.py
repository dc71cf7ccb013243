"""The small trained model that the quickstart runs on, and the pictures that it was trained with."""
