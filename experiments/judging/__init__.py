"""What `advice_quality` judges the advice by: problems that the method was not changed on, and a search of its own."""
