// 25 steps with RunPod's SDK for JavaScript, `runpod-sdk`, as its users write them. Prints a line of JSON for each.
//
//     node tests/clients/js/scenario.mjs http://localhost:8000/v2 KEY     (npm ci first)
//
// The server runs one job at a time, so that what is sent while a long one runs waits.

import assert from "node:assert/strict"
import runpodSdk from "runpod-sdk"

const [baseUrl, key] = process.argv.slice(2)
const say = console.log
console.log = () => {} // the SDK prints what it waits for

const PROMPT = "a red circle on a blue background"
const endpoint = runpodSdk(key, { baseUrl }).endpoint("demo-js")
const native = (seed, steps = 8) => ({
  modelInputs: { prompt: PROMPT, num_inference_steps: steps, seed },
  callInputs: { image_metadata: false },
})
const simple = (seed, steps = 8) => ({ prompt: PROMPT, num_inference_steps: steps, seed, image_metadata: false })
// takes minutes; is always cancelled
const LONG = { modelInputs: { prompt: PROMPT, num_inference_steps: 500, num_images_per_prompt: 16 } }
const UNREACHABLE = {
  modelInputs: { prompt: PROMPT, image: "http://127.0.0.1:9/x.png" },
  callInputs: { is_url: true },
}
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

let done = 0
async function step(what, body) {
  const began = Date.now()
  const told = { step: ++done, what, ok: true }
  try {
    await body()
  } catch (error) {
    Object.assign(told, { ok: false, error: String(error?.stack ?? error) })
  }
  say(JSON.stringify({ ...told, seconds: (Date.now() - began) / 1000 }))
}

async function until(condition, seconds = 90) {
  const end = Date.now() + seconds * 1000
  while (!(await condition())) {
    assert.ok(Date.now() < end, "it does not come")
    await sleep(100)
  }
}

async function refused(call, status) {
  const error = await call().then(
    () => assert.fail("it was not refused"),
    (error) => error,
  )
  assert.equal(error.response?.status, status, String(error))
  return error.response.data
}

async function send(request) {
  const { id } = await endpoint.run(request)
  assert.ok(id)
  return id
}

const statusOf = async (id) => (await endpoint.status(id)).status
const sync = async (input) => (await endpoint.runSync({ input })).output
const known = {}
let first

await step("health counts the jobs and the workers of an endpoint at which nothing happens", async () => {
  const health = await endpoint.health()
  assert.deepEqual(Object.keys(health.jobs).sort(), ["completed", "failed", "inProgress", "inQueue", "retried"])
  assert.deepEqual(Object.keys(health.workers).sort(), ["idle", "initializing", "ready", "running", "throttled"])
  assert.ok([...Object.values(health.jobs), ...Object.values(health.workers)].every(Number.isInteger))
  assert.deepEqual([health.workers.ready, health.jobs.inProgress, health.jobs.inQueue], [1, 0, 0])
})
await step("run answers at once with an id and a status", async () => {
  const answer = await endpoint.run({ input: native(1, 40) })
  first = answer.id
  assert.ok(first)
  assert.ok(["IN_QUEUE", "IN_PROGRESS"].includes(answer.status))
})
await step("status says that it is not over", async () => {
  const answer = await endpoint.status(first)
  assert.equal(answer.started, true)
  assert.equal(answer.completed, false)
  assert.equal(answer.id, first)
})
await step("statusSync waits for the native response", async () => {
  const answer = await endpoint.statusSync(first)
  assert.deepEqual([answer.status, answer.completed, answer.succeeded], ["COMPLETED", true, true])
  assert.equal(answer.output.$meta.modelInputs.seed, 1)
  assert.ok(Number.isInteger(answer.delayTime) && answer.executionTime > 0)
  known[0] = answer.output.image_base64
  assert.ok(known[0].startsWith("iVBOR"))
})
await step("runSync waits by itself; the same seed is the same image", async () => {
  known[1] = (await sync(native(1))).image_base64
  assert.ok(known[1].startsWith("iVBOR"))
  assert.equal((await sync(native(1))).image_base64, known[1])
})
await step("another seed is another image", async () => {
  known[2] = (await sync(native(2))).image_base64
  assert.notEqual(known[2], known[1])
})
await step("the simple form gives the same image as the native one, and says the seed", async () => {
  const output = await sync(simple(1))
  assert.deepEqual([output.image, output.seed, output.image_base64], [known[1], 1, undefined])
})
await step("runSync with a short wait asks again until it is over", async () => {
  const answer = await endpoint.runSync({ input: native(1, 40) }, 60000)
  assert.deepEqual([answer.succeeded, answer.output.image_base64], [true, known[0]])
  const early = await endpoint.runSync({ input: LONG }, 1000)
  assert.deepEqual([early.started, early.completed, early.output?.image_base64], [true, false, undefined])
  await endpoint.cancel(early.id)
})
await step("an input that cannot be is refused at once, with its name and what was meant", async () => {
  const told = await refused(() => endpoint.run({ input: { ...simple(1), widht: 64 } }), 400)
  assert.match(told.error, /input\.widht.*width/)
})
await step("a job that is not known is a 404", async () => {
  await refused(() => endpoint.status("no-such-job"), 404)
})
await step("a wrong key is a 401", async () => {
  const wrong = runpodSdk("wrong-key-of-a-stranger", { baseUrl }).endpoint("demo-js")
  await refused(() => wrong.run({ input: simple(1) }), 401)
  await refused(() => wrong.health(), 401)
  await refused(() => wrong.purgeQueue(), 401)
})
await step("a job that fails is FAILED, and says why", async () => {
  const id = await send({ input: UNREACHABLE })
  const answer = await endpoint.statusSync(id)
  assert.deepEqual([answer.status, answer.completed, answer.succeeded], ["FAILED", true, false])
  assert.match(answer.error, /SOURCE_UNREACHABLE/)
})
await step("runSync of a job that fails comes back as well", async () => {
  const answer = await endpoint.runSync({ input: UNREACHABLE })
  assert.deepEqual([answer.status, answer.succeeded, answer.output], ["FAILED", false, undefined])
})

const long = await send({ input: LONG })
const waiting = await send({ input: native(1) })
await step("a job that runs tells how far it is", async () => {
  await until(async () => ((await endpoint.status(long)).output?.step ?? 0) >= 1)
  const { status, output } = await endpoint.status(long)
  assert.equal(status, "IN_PROGRESS")
  assert.equal(output.total, 500)
  assert.ok(output.progress > 0 && output.progress < 1)
})
await step("what comes meanwhile waits, and health counts both", async () => {
  assert.equal(await statusOf(waiting), "IN_QUEUE")
  const { jobs } = await endpoint.health()
  assert.deepEqual([jobs.inProgress, jobs.inQueue], [1, 1])
})
await step("cancel takes a job that waits out of the queue", async () => {
  assert.deepEqual(await endpoint.cancel(waiting), { id: waiting, status: "CANCELLED" })
  const answer = await endpoint.status(waiting)
  assert.deepEqual([answer.status, answer.completed, answer.succeeded], ["CANCELLED", true, false])
})
await step("cancel ends a job that runs, and the next one begins", async () => {
  assert.equal((await endpoint.cancel(long)).status, "CANCELLED")
  assert.equal((await sync(native(1))).image_base64, known[1])
  assert.equal(await statusOf(long), "CANCELLED")
})
await step("cancel changes nothing of a job that is over", async () => {
  assert.deepEqual(await endpoint.cancel(first), { id: first, status: "COMPLETED" })
  assert.equal((await endpoint.status(first)).output.image_base64, known[0])
})

const streamed = await send({ input: native(1, 40) })
await step("stream tells the steps in their order, and at last the output", async () => {
  const told = []
  for await (const one of endpoint.stream(streamed)) told.push(one.output)
  const steps = told.filter((one) => "step" in one).map((one) => one.step)
  assert.ok(steps.length > 0)
  assert.deepEqual(steps, [...steps].sort((a, b) => a - b))
  assert.equal(told.at(-1).image_base64, known[0])
})
await step("a stream that was read to its end is over at once when it is asked for again", async () => {
  const told = []
  for await (const one of endpoint.stream(streamed)) told.push(one)
  assert.deepEqual(told, [])
})
await step("purgeQueue takes what waits, and leaves what runs", async () => {
  const running = await send({ input: LONG })
  await until(async () => (await statusOf(running)) === "IN_PROGRESS")
  const queued = await Promise.all([1, 2, 3].map((seed) => send({ input: native(seed) })))
  assert.deepEqual(await endpoint.purgeQueue(), { removed: 3, status: "completed" })
  assert.deepEqual(await Promise.all(queued.map(statusOf)), ["CANCELLED", "CANCELLED", "CANCELLED"])
  assert.equal(await statusOf(running), "IN_PROGRESS")
  await endpoint.cancel(running)
})

const short = await send({ input: LONG, policy: { executionTimeout: 5000 } })
const blocking = await send({ input: LONG })
const brief = await send({ input: native(1), policy: { ttl: 10000 } })
await step("a job that runs longer than its executionTimeout is TIMED_OUT", async () => {
  await until(async () => (await endpoint.status(short)).completed, 30)
  const answer = await endpoint.status(short)
  assert.deepEqual([answer.status, answer.succeeded], ["TIMED_OUT", false])
  assert.ok(answer.error)
})
await step("a job that waits longer than its ttl is TIMED_OUT, and never ran", async () => {
  await until(async () => (await endpoint.status(brief)).completed, 30)
  const answer = await endpoint.status(brief)
  assert.deepEqual([answer.status, answer.executionTime], ["TIMED_OUT", undefined])
})
await step("lowPriority lets those that came later go first", async () => {
  const low = await send({ input: native(1), policy: { lowPriority: true } })
  const normal = await send({ input: native(2) })
  await endpoint.cancel(blocking)
  const [one, other] = await Promise.all([endpoint.statusSync(low), endpoint.statusSync(normal)])
  assert.deepEqual([one.output.image_base64, other.output.image_base64], [known[1], known[2]])
  assert.ok(one.delayTime > other.delayTime)
})
await step("many at once, and each gets its own image", async () => {
  const seeds = [1, 2, 1, 2, 1, 2, 1, 2]
  const ids = await Promise.all(seeds.map((seed) => send({ input: native(seed) })))
  assert.equal(new Set(ids).size, 8)
  const answers = await Promise.all(ids.map((id) => endpoint.statusSync(id)))
  assert.deepEqual(
    answers.map((answer) => answer.output.image_base64),
    seeds.map((seed) => known[seed]),
  )
})
