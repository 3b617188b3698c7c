// One round trip with npm's `openai`; runs in the environment `node`.
// In: the server's URL, a model, a question, a number of tokens. Out: a JSON object as client_python.py prints it.
import { createRequire } from "node:module";

const require = createRequire(`${process.cwd()}/package.json`);
const { OpenAI } = require("openai");
const [url, model, question, tokens] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const body = {
  model,
  messages: [{ role: "user", content: question }],
  max_tokens: Number(tokens),
  temperature: 0,
};
const whole = await client.chat.completions.create(body);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
const text = whole.choices[0].message.content;
console.log(JSON.stringify({ "openai-node": { text, streamed, tokens: whole.usage.completion_tokens } }));
