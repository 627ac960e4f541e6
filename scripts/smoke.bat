@echo off
rem The whole pipeline on made-up data and a tiny LLM, in seconds: .\scripts\smoke.bat
python "%~dp0launch.py" smoke %*
exit /b %errorlevel%
