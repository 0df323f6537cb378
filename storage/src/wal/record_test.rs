//! Records come back as they were written, and any bytes give an error at worst.

use proptest::prelude::*;

use super::*;

fn entry() -> impl Strategy<Value = LogEntry> {
    let bytes = prop_oneof![0usize..40, 1000..1050usize]
        .prop_flat_map(|size| proptest::collection::vec(any::<u8>(), size))
        .prop_map(Bytes::from);
    let payload = prop_oneof![
        Just(Payload::Blank),
        bytes.clone().prop_map(Payload::Membership),
        bytes.clone().prop_map(Payload::Control),
        (bytes, any::<i64>(), any::<i64>()).prop_map(|(bytes, base, next)| Payload::Batches {
            bytes,
            base_offset: Offset(base),
            next_offset: Offset(next)
        }),
    ];
    (any::<u64>(), any::<u64>(), payload).prop_map(|(index, term, payload)| LogEntry {
        index,
        term,
        payload,
    })
}

proptest! {
    #[test]
    fn records_round_trip(
        group in any::<u64>(), committed_next in any::<u64>(), relocated in any::<bool>(),
        entries in proptest::collection::vec(entry(), 0..5),
        vote in proptest::collection::vec(any::<u8>(), 0..128),
    ) {
        let group = RaftGroupId(group);
        let purged = Purged { index: 1, term: 2, next_offset: Offset(committed_next as i64) };
        let state = Bytes::from(vote.clone());
        let records = [
            Record::entries(group, relocated, committed_next, entries.iter()),
            Record::vote(group, &vote),
            Record::truncate(group, committed_next),
            Record::delete(group),
            Record::mark(),
            Record::purge(group, purged, 3, &Bytes::from(vote.clone())),
            Record::log_start(group, Offset(9)),
            Record::install(group, &Bytes::from(vec![1; 3000])),
            Record::replace(group, &Bytes::from(vec![2; 30])),
        ];
        let mut body = Vec::new();
        for record in &records {
            let at = body.len();
            record.parts().for_each(|part| body.extend_from_slice(part));
            prop_assert_eq!(body.len() - at, record.size_bytes());
        }
        let decoded = decode(&Bytes::from(body)).unwrap();
        let actions: Vec<_> = decoded.into_iter().map(|d| d.action).collect();
        prop_assert_eq!(actions, vec![
            Action::Entries { relocated, committed_next, entries },
            Action::Vote(vote.clone().into()),
            Action::Truncate { next: committed_next },
            Action::Delete,
            Action::Mark,
            Action::Purge { purged, state_index: 3, state },
            Action::LogStart(Offset(9)),
            Action::Install(Bytes::from(vec![1; 3000])),
            Action::Replace(Bytes::from(vec![2; 30])),
        ]);
    }

    #[test]
    fn any_bytes_decode_or_fail_without_panic(
        bytes in proptest::collection::vec(0u8..12, 0..300),
    ) {
        let _ = decode(&Bytes::from(bytes));
    }
}
