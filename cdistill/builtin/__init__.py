"""The built-in task: scenes, their pictures and questions, the data sets made of them, and accuracy on those held out."""
