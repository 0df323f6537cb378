// Fills the topics kafkajs-<codec> with the records of the client matrix and reads them back.
//
// Usage: roundtrip.js BOOTSTRAP RECORDS. Every topic exists with 3 partitions. A record is
// "kafkajs:<number, 8 digits>:<filling>" in partition number mod 3, as in the other clients.
'use strict'

// Its packages are in the cache folder of the tests, not beside this file.
const { createRequire } = require('node:module')
const load = createRequire(`${process.env.CHRONIK_KAFKAJS_DIR}/package.json`)
const { Kafka, CompressionTypes, CompressionCodecs, logLevel } = load('kafkajs')
const snappy = load('kafkajs-snappy')
const lz4 = load('lz4js')
const lz4Hash = load('lz4js/xxh32').hash
const zstd = load('@bokuweb/zstd-wasm')

const CLIENT = 'kafkajs'
const PARTITIONS = 3
const DEADLINE_MS = 120_000

CompressionCodecs[CompressionTypes.Snappy] = snappy
CompressionCodecs[CompressionTypes.LZ4] = () => ({
  compress: async encoder => lz4Frame(encoder.buffer),
  decompress: async buffer => Buffer.from(lz4.decompress(buffer)),
})
CompressionCodecs[CompressionTypes.ZSTD] = () => ({
  compress: async encoder => Buffer.from(zstd.compress(encoder.buffer, 3)),
  decompress: async buffer => Buffer.from(zstd.decompress(buffer)),
})

// Kafka takes frames of independent blocks only. A batch is one block, so its frame may say so.
function lz4Frame(bytes) {
  const frame = Buffer.from(lz4.compress(bytes))
  frame[4] |= 0x20
  frame[6] = (lz4Hash(0, frame, 4, 2) >> 8) & 0xff
  return frame
}

const CODECS = {
  none: CompressionTypes.None,
  gzip: CompressionTypes.GZIP,
  snappy: CompressionTypes.Snappy,
  lz4: CompressionTypes.LZ4,
  zstd: CompressionTypes.ZSTD,
}

function valueOf(number) {
  const letter = String.fromCharCode('a'.charCodeAt(0) + (number % 26))
  return `${CLIENT}:${String(number).padStart(8, '0')}:${letter.repeat(100)}`
}

async function produce(kafka, topic, records, compression) {
  const producer = kafka.producer({ idempotent: true, maxInFlightRequests: 1 })
  await producer.connect()
  for (let first = 0; first < records; first += 500) {
    const messages = []
    for (let n = first; n < Math.min(first + 500, records); n++) {
      messages.push({ value: valueOf(n), partition: n % PARTITIONS })
    }
    await producer.send({ topic, messages, compression, acks: -1 })
  }
  await producer.disconnect()
}

async function consume(kafka, topic, records) {
  const consumer = kafka.consumer({ groupId: `${topic}-reader`, maxWaitTimeInMs: 200 })
  await consumer.connect()
  await consumer.subscribe({ topic, fromBeginning: true })
  const following = [...Array(PARTITIONS).keys()]
  let found = 0
  try {
    await new Promise((resolve, reject) => {
      consumer.on(consumer.events.CRASH, event => reject(event.payload.error))
      consumer
        .run({
          eachMessage: async ({ partition, message }) => {
            const expected = valueOf(following[partition])
            const value = message.value.toString()
            if (value !== expected) {
              reject(new Error(`${topic}-${partition} offset ${message.offset}: ${value} for ${expected}`))
            }
            following[partition] += PARTITIONS
            found += 1
            if (found === records) resolve()
          },
        })
        .catch(reject)
    })
  } finally {
    await consumer.disconnect()
  }
  if (found !== records) throw new Error(`${topic}: read ${found} of ${records} records`)
}

async function main() {
  const [bootstrap, count] = process.argv.slice(2)
  const records = Number(count)
  await zstd.init()
  const kafka = new Kafka({
    clientId: 'chronik-tests',
    brokers: bootstrap.split(','),
    logLevel: logLevel.ERROR,
  })
  for (const [codec, compression] of Object.entries(CODECS)) {
    const topic = `${CLIENT}-${codec}`
    await produce(kafka, topic, records, compression)
    await consume(kafka, topic, records)
    console.log(`${topic}: ${records} records written and read back`)
  }
}

setTimeout(() => {
  console.error(`not done after ${DEADLINE_MS} ms`)
  process.exit(1)
}, DEADLINE_MS).unref()

main().then(
  () => process.exit(0),
  error => {
    console.error(error)
    process.exit(1)
  },
)
